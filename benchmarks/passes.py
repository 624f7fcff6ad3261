"""Whether a layer moves no more through an H100's memory than it did: `python -m benchmarks.passes`.

Needs the compiler's wheels (benchmarks/targets.py) and no GPU; ends with an error where a count is above its
limit.
"""

import functools
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from benchmarks import contestants, network, programs, tables, targets
from benchmarks.processes import AHEAD, apart
from jbn.linen import BatchNorm

SHAPE = (256, 56, 56, 64)
DTYPES = ("bfloat16", "float32")
COLUMNS = [f"{dtype}, {program}" for dtype in DTYPES for program in programs.PROGRAMS]
# What was counted, and up to a tenth more; JAX 0.10.2 and 0.12.0 give the same. Whoever moves less lowers the
# limit. The blocks show what a layer alone does not, what it shares with its neighbours; they are counted
# without their convolutions, in passes over their output. NOTES.md says more of both.
LIMITS = {
    "evaluation": (2.1, 4.1, 2.1, 4.1),
    "training": (3.1, 8.1, 3.1, 8.1),
    "relu": (3.1, 8.1, 3.1, 8.1),
    "relu and residual": (4.1, 12.1, 4.1, 12.1),
    "silu": (3.1, 8.1, 3.1, 8.1),
    "gelu": (3.1, 8.1, 3.1, 8.1),
    "leaky_relu": (3.1, 8.1, 3.1, 8.1),
    "hard_swish": (3.1, 8.1, 3.1, 8.1),
    "tanh": (3.1, 10.1, 3.1, 10.1),
    "ghost batches": (3.1, 10.1, 3.1, 10.1),
    "renorm": (3.1, 8.1, 3.1, 8.1),
    "mask of [N]": (3.1, 8.1, 3.1, 8.1),
    "mask of [N, 1, 1, 1]": (3.1, 8.1, 3.1, 8.1),
    "mask of [N, T]": (3.1, 8.1, 3.1, 8.1),
    "mask of rows": (3.1, 8.1, 3.1, 8.1),
    "mask of entries": (7.1, 12.6, 6.1, 11.3),
    "explicit axis": (3.1, 8.1, 3.1, 8.1),
    "explicit axis, mask of [N]": (3.1, 8.1, 3.1, 8.1),
    "two blocks of ResNet-50": (None, 63.3, None, 54.4),
    "the same, relu inside": (None, 58.3, None, 54.2),
}
OPTIONS = {"ghost batches": {"virtual_batch_size": 32}, "renorm": {"renorm": jbn.Renorm(3, 5)}}
MASKS = {
    "[N]": SHAPE[:1],
    "[N, 1, 1, 1]": (SHAPE[0], 1, 1, 1),
    "[N, T]": SHAPE[:2],
    "rows": SHAPE[:3],
    "entries": SHAPE,
}
NETWORKS = {"two blocks of ResNet-50": "jbn", "the same, relu inside": "jbn, relu inside"}


def main():
    if reason := targets.missing("H100"):
        sys.exit(f"not counted: {reason}")
    found = apart("benchmarks.passes:counted", AHEAD)
    rows, above = [], []
    for name, limits in LIMITS.items():
        rows.append([name])
        for column, passes, limit in zip(COLUMNS, found[name], limits, strict=True):
            rows[-1].append(None if limit is None else f"{passes:.2f} of {limit}")
            if limit is not None and passes > limit:
                above.append(f"{name}, {column}: {passes:.2f} passes, and at most {limit} are allowed")
    print(tables.grid(["passes", *COLUMNS], rows), flush=True)
    sys.exit("\n".join(above) or None)


def counted():
    """{name: the passes of each column}"""
    found = {}
    for name in LIMITS:
        count = of_network if name in NETWORKS else of_layer
        found[name] = [passes for dtype in DTYPES for passes in count(name, jnp.dtype(dtype))]
    return found


def of_layer(name, dtype):
    """Forward, and with the gradients of x, scale, bias and the residual."""
    mesh = targets.mesh("H100")
    if name.startswith("explicit axis"):
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,))
    rows = NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct(SHAPE, dtype, sharding=rows)
    mask = MASKS.get(name.rpartition("mask of ")[2])
    mask = None if mask is None else jax.ShapeDtypeStruct(mask, jnp.bool_, sharding=rows)
    residual = x if name == "relu and residual" else None
    setting = contestants.Setting(SHAPE, dtype, training=name != "evaluation")
    options = OPTIONS.get(name, {"activation": getattr(jax.nn, name, None)})
    layer = contestants.linen(setting, functools.partial(BatchNorm, **options), inside=True)

    def apply(params, state, x):
        (params, residual), (state, mask) = params, state
        return layer.apply(params, state, x, residual, relu=name.startswith("relu"), mask=mask)

    params, state = programs.shapes((layer.params, layer.state), NamedSharding(mesh, P()))
    whole = contestants.Layer((params, residual), (state, mask), apply)
    start = [whole.params, whole.state, x]
    for program, make in programs.PROGRAMS.items():
        arguments = start if program == "forward" else [*start, x]
        compiled = targets.compiled(make(whole), arguments, "H100")
        yield targets.moved(compiled, "H100") / (x.size * dtype.itemsize)


def of_network(name, dtype):
    """One training step; the first block's shortcut has a batch norm of its own, the second's has none."""
    made = network.ResNet50(contestants.named(NETWORKS[name]), dtype, batch=64, blocks=(2,))
    arguments = programs.shapes((made.params, made.state, *made.inputs), targets.place("H100"))
    compiled = targets.compiled(made.step, arguments, "H100", donate_argnums=(0, 1))
    yield from (None, targets.moved(compiled, "H100", library=False) / (64 * 56 * 56 * 256 * dtype.itemsize))


if __name__ == "__main__":
    main()
