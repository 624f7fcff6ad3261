"""Times of forward + backward on a CPU, as ratios, and the time per element from 1 MB to 1 GB."""

import functools
import math
from statistics import geometric_mean, median

from benchmarks import timing
from benchmarks.tables import Table

SHAPES = ((32, 28, 28, 256), (32, 56, 56, 64), (64, 7, 7, 2048), (8192, 1024))
ROUNDS = 100
MANY = 256  # megabytes, from which on a few rounds take long enough
BASE = "Flax"
ABOUT = """\
Forward + backward of one layer in training, {rounds} rounds, all interleaved in one process. Ratio of the
medians to Flax's default (in parentheses the quartiles of the ratios of single rounds); less is faster.
Freed memory stays with the process, so that no layer pays for page faults by chance."""
GROWTH = """\
Forward + backward of one layer, float32, x of [n, 56, 56, 64]: nanoseconds per element, medians of {rounds}
rounds from {many} MB on, and of as many more as x is smaller."""


def tables(quick=False):
    rounds = 3 if quick else ROUNDS
    shapes = ((32, 14, 14, 64),) if quick else SHAPES
    return [ratios(shapes, rounds), growth((1, 4) if quick else (1, 8, 64, 256, 1024), 1 if quick else 7)]


def ratios(shapes, rounds):
    """The table, with the geometric mean below: first what it is for one dtype, then for both."""
    from benchmarks import contestants, pytorch

    names = [one.name for one in contestants.installed()] + ["PyTorch"] * pytorch.installed()
    rows, found = [], {name: [] for name in (*names, "best")}
    for dtype in ("float32", "bfloat16"):
        for shape in shapes:
            times = timing.interleaved(runs(shape, dtype), rounds)
            compared = {name: timing.ratio(times, name, BASE) for name in names}
            best = min(compared[name][0] for name in ("Flax", "Haiku") if name in compared)
            for name in names:
                found[name].append(compared[name][0])
            found["best"].append(compared["jbn"][0] / best)
            cells = [timing.shown(compared[name]) for name in names if name != BASE]
            rows.append([str(list(shape)), dtype, 1e3 * median(times[BASE]), *cells, found["best"][-1]])
    means = [f"{geometric_mean(found[name]):.2f}" for name in (*names, "best") if name != BASE]
    rows.append(["geometric mean", "", None, *means])
    header = [
        "x",
        "dtype",
        "Flax, ms",
        *(name for name in names if name != BASE),
        "jbn / faster of Flax, Haiku",
    ]
    return Table("CPU times", ABOUT.format(rounds=rounds), header, rows)


@functools.cache
def arrays(shape):
    import numpy as np

    random = np.random.default_rng(0)
    return [random.standard_normal(shape, np.float32) for _ in range(2)]


def runs(shape, dtype, only=None):
    """{contestant: a function that does one step and waits for it}."""
    from benchmarks import contestants, pytorch

    found = {
        one.name: jax_run(one, shape, dtype) for one in contestants.installed() if only in (None, one.name)
    }
    if pytorch.installed() and only in (None, "PyTorch"):
        layer = pytorch.Layer(shape, dtype)
        found["PyTorch"] = functools.partial(layer.step, *map(layer.tensor, arrays(shape)))
    return found


def jax_run(contestant, shape, dtype):
    import jax
    import jax.numpy as jnp

    from benchmarks import contestants, programs

    x, dy = (jnp.asarray(array, dtype) for array in arrays(shape))
    made = contestant.make(contestants.Setting(shape, x.dtype))
    step = jax.jit(programs.with_gradients(made))
    return lambda: jax.block_until_ready(step(made.params, made.state, x, dy))


def growth(megabytes, rounds):
    """Nanoseconds per element for x of so many megabytes."""
    from benchmarks import contestants, pytorch

    names = [name for name in ("jbn", "Flax") if contestants.named(name).installed()]
    names += ["PyTorch"] * pytorch.installed()
    rows = []
    for size in megabytes:
        shape = (math.ceil(size * 1e6 / (56 * 56 * 64 * 4)), 56, 56, 64)
        elements, cells = math.prod(shape), []
        for name in names:  # one by one: the largest are some gigabytes each
            times = timing.interleaved(runs(shape, "float32", name), rounds * max(1, MANY // size), before=1)
            cells.append(1e9 * median(times[name]) / elements)
        arrays.cache_clear()
        rows.append([f"{4e-6 * elements:.1f} MB", *cells])
    return Table("Time per element", GROWTH.format(rounds=rounds, many=MANY), ["x", *names], rows)
