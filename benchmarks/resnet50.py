"""Gigabytes that one training step of ResNet-50 moves, and its peak of temporary memory."""

from benchmarks.processes import AHEAD, parallel
from benchmarks.tables import Table, missing

TITLE = "ResNet-50, one training step at batch 128"
ABOUT = """\
The same network around every layer, compiled ahead of time: gigabytes, {how}. In parentheses: relative to
Flax's default. `relu inside` is jbn with activation and residual in the layer."""
HOW = {
    "H100": "read and written outside of the convolutions",
    "TPU v5e": "XLA's own estimate, convolutions included, since XLA fuses them with their neighbours there, "
    "and without jbn's second pass where the running mean is far off, a branch; other layers, each some "
    "minutes to compile, are left out",
}
DTYPES = ("bfloat16", "float32")
BASE = "Flax"
ON_TPU = ("jbn", "jbn, relu inside", BASE)


def tables(quick=False):
    if quick:
        return [missing(TITLE, "each takes a minute to compile, left out by --quick")]
    return [of_target(target) for target in HOW]


def of_target(target):
    """A line for each layer; two columns for each dtype."""
    from benchmarks import contestants, targets

    title = f"{TITLE}, {target}"
    if reason := targets.missing(target):
        return missing(title, reason)
    names = [one.name for one in contestants.installed(inside=True)]
    names = [name for name in names if target == "H100" or name in ON_TPU]
    tasks = [(name, target, dtype) for dtype in DTYPES for name in names]
    results = dict(zip(tasks, parallel(f"{__name__}:step", tasks, AHEAD), strict=True))
    header, rows = ["layer"], [[name] for name in names]
    for dtype in DTYPES:
        header += [f"{dtype}, GB", "peak temporary, GB"]
        base = results.get((BASE, target, dtype), {})
        for row in rows:
            row.extend(cells(results[row[0], target, dtype], base))
    failed = sorted({result["failed"] for result in results.values() if "failed" in result})
    return Table(title, " ".join([ABOUT.format(how=HOW[target]), *failed]), header, rows)


def step(name, target, dtype):
    """Gigabytes of a step with one layer."""
    import jax.numpy as jnp

    from benchmarks import contestants, network, programs, targets

    made = network.ResNet50(contestants.named(name), jnp.dtype(dtype))
    arguments = programs.shapes((made.params, made.state, *made.inputs), targets.place(target))
    compiled = targets.compiled(made.step, arguments, target, donate_argnums=(0, 1))
    moved = targets.moved(compiled, target, library=False)
    return {"moved": moved / 1e9, "temporary": targets.temporary(compiled) / 1e9}


def cells(result, base):
    if "failed" in result:
        return [None, None]
    relative = f" ({result['moved'] / base['moved']:.3f})" if "moved" in base else ""
    return [f"{result['moved']:.1f}{relative}", result["temporary"]]
