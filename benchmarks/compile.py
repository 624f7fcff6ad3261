"""How long it takes to trace and compile many layers, and that it is linear in their number."""

import functools
from statistics import median

from benchmarks import timing
from benchmarks.tables import Table

LAYERS, FEATURES, ROWS = 60, 128, 64
ROUNDS = 20
ABOUT = """\
{layers} blocks of dense, batch norm and relu, forward + backward, on a CPU: seconds to trace and lower,
to compile, and both, medians of {rounds} rounds, interleaved in one process. Ratio of the medians of both
to Flax's default (in parentheses the quartiles of the ratios of single rounds)."""
GROWTH = """\
Seconds to trace, lower and compile so many blocks, and milliseconds per block; medians of {rounds}
rounds, interleaved."""


def tables(quick=False):
    layers, rounds = (6, 2) if quick else (LAYERS, ROUNDS)
    return [compared(layers, rounds), growth((2, 4) if quick else (15, 30, 60, 120), 2 if quick else 7)]


def compared(layers, rounds):
    from benchmarks import contestants

    parts = {}

    def run(contestant):
        parts.setdefault(contestant.name, []).append(seconds(contestant, layers))

    every = contestants.installed(inside=True)
    times = timing.interleaved({one.name: lambda one=one: run(one) for one in every}, rounds, before=1)
    rows = []
    for name in times:
        lowering, compiling = zip(*parts[name][1:], strict=True)
        both = {key: [sum(pair) for pair in found[1:]] for key, found in parts.items()}
        cells = [median(values) for values in (lowering, compiling, both[name])]
        rows.append([name, *cells, timing.shown(timing.ratio(both, name, "Flax"))])
    header = ["layer", "trace and lower, s", "compile, s", "both, s", "ratio to Flax"]
    return Table("Compile time", ABOUT.format(layers=layers, rounds=rounds), header, rows)


def growth(numbers, rounds):
    from benchmarks import contestants

    names = [name for name in ("jbn", "Flax") if contestants.named(name).installed()]
    rows = []
    for layers in numbers:
        rows.append([layers])
        found = {name: [] for name in names}

        def run(name, found=found, layers=layers):
            found[name].append(sum(seconds(contestants.named(name), layers)))

        timing.interleaved({name: functools.partial(run, name) for name in names}, rounds, before=1)
        for name in names:
            middle = median(found[name][1:])
            rows[-1] += [middle, 1e3 * middle / layers]
    header = ["blocks", *(text for name in names for text in (f"{name}, s", f"{name}, ms per block"))]
    return Table("Compile time by number of blocks", GROWTH.format(rounds=rounds), header, rows)


def seconds(contestant, layers):
    """To trace and lower, and to compile; nothing is remembered from an earlier call."""
    import gc
    import time

    import jax
    import jax.numpy as jnp

    from benchmarks import contestants, programs

    jax.clear_caches()
    gc.collect()  # what another layer has left would be collected on this one's time
    made = contestant.make(contestants.Setting((ROWS, FEATURES)))
    x = jax.ShapeDtypeStruct((ROWS, FEATURES), jnp.float32)
    dense = jax.ShapeDtypeStruct((FEATURES, FEATURES), jnp.float32)
    params = [(dense, programs.shapes(made.params)) for _ in range(layers)]
    states = [programs.shapes(made.state) for _ in range(layers)]

    def loss(params, states, x):
        new = []
        for (kernel, norm), state in zip(params, states, strict=True):
            x, changed = made.apply(norm, state, x @ kernel, relu=True)
            new.append(changed)
        return jnp.sum(x * x), new

    start = time.perf_counter()
    lowered = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, states, x)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle
