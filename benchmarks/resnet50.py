"""Gigabytes that one training step of ResNet-50 moves, and its peak of temporary memory."""

from benchmarks.processes import AHEAD, parallel
from benchmarks.tables import Table, missing

TITLE = "ResNet-50, one training step at batch 128"
ABOUT = """\
The same network around every layer, compiled ahead of time. H100: gigabytes read and written outside of
the convolutions; TPU v5e: XLA's own estimate, convolutions included, since XLA fuses them with their
neighbours there, and without jbn's second pass where the running mean is far off, a branch. In
parentheses: relative to Flax's default. `relu inside` is jbn with activation and residual in the layer."""
DTYPES = ("bfloat16", "float32")
BASE = "Flax"


def tables(quick=False):
    from benchmarks import contestants, targets

    if quick:
        return [missing(TITLE, "each takes a minute to compile, left out by --quick")]
    ready = [target for target in targets.NEEDS if targets.missing(target) is None]
    if not ready:
        return [missing(TITLE, "; ".join(map(targets.missing, targets.NEEDS)))]
    names = [one.name for one in contestants.installed(inside=True)]
    tasks = [(name, target, dtype) for target in ready for dtype in DTYPES for name in names]
    results = dict(zip(tasks, parallel(f"{__name__}:step", tasks, AHEAD), strict=True))
    return [table(names, [(target, dtype) for target in ready for dtype in DTYPES], results)]


def step(name, target, dtype):
    """Gigabytes of a step with one layer."""
    import jax.numpy as jnp

    from benchmarks import contestants, network, programs, targets

    made = network.ResNet50(contestants.named(name), jnp.dtype(dtype))
    arguments = programs.shapes((made.params, made.state, made.x, made.labels), targets.place(target))
    compiled = targets.compiled(made.step, arguments, target, donate_argnums=(0, 1))
    moved = targets.moved(compiled, target, library=False)
    return {"moved": moved / 1e9, "temporary": targets.temporary(compiled) / 1e9}


def table(names, columns, results):
    """A line for each layer; two columns for each target and dtype."""
    header, rows = ["layer"], []
    for target, dtype in columns:
        header += [f"{target} {dtype}, GB", "peak temporary, GB"]
    for name in names:
        rows.append([name])
        for column in columns:
            rows[-1] += cells(results[name, *column], results.get((BASE, *column), {}))
    failed = sorted({result["failed"] for result in results.values() if "failed" in result})
    return Table(TITLE, " ".join([ABOUT, *failed]), header, rows)


def cells(result, base):
    if "failed" in result:
        return [None, None]
    relative = f" ({result['moved'] / base['moved']:.3f})" if "moved" in base else ""
    return [f"{result['moved']:.1f}{relative}", result["temporary"]]
