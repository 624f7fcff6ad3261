"""How long it takes to trace and compile many layers, and that it is linear in their number."""

import functools
import gc
import time
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

    parts = interleaved(contestants.installed(inside=True), layers, rounds)
    both = {name: [sum(pair) for pair in found] for name, found in parts.items()}
    rows = []
    for name, found in parts.items():
        cells = [median(values) for values in (*zip(*found, strict=True), both[name])]
        rows.append([name, *cells, timing.shown(timing.ratio(both, name, "Flax"))])
    header = ["layer", "trace and lower, s", "compile, s", "both, s", "ratio to Flax"]
    return Table("Compile time", ABOUT.format(layers=layers, rounds=rounds), header, rows)


def growth(numbers, rounds):
    from benchmarks import contestants

    every = [one for one in map(contestants.named, ("jbn", "Flax")) if one.installed()]
    rows = []
    for layers in numbers:
        rows.append([layers])
        for found in interleaved(every, layers, rounds).values():
            middle = median(map(sum, found))
            rows[-1] += [middle, 1e3 * middle / layers]
    header = ["blocks", *(text for one in every for text in (f"{one.name}, s", f"{one.name}, ms per block"))]
    return Table("Compile time by number of blocks", GROWTH.format(rounds=rounds), header, rows)


def interleaved(every, layers, rounds):
    """{name: seconds to trace and lower, and to compile, in every round}."""
    parts = {one.name: [] for one in every}

    def run(contestant):
        parts[contestant.name].append(seconds(contestant, layers))

    timing.interleaved({one.name: functools.partial(run, one) for one in every}, rounds, before=1)
    return {name: found[1:] for name, found in parts.items()}


def seconds(contestant, layers):
    """To trace and lower, and to compile; nothing is remembered from an earlier call."""
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
