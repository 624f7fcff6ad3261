"""What is kept for the backward pass."""

import math

from benchmarks.tables import Table

SHAPE = (64, 32, 32, 64)
ABOUT = f"""\
x of {list(SHAPE)}. What the forward pass keeps for the backward pass, before XLA optimizes, in sizes of
x: all of it, and the dtypes of the arrays as large as x. PyTorch: the tensors that it saves."""
HEADER = ["dtype", "layer", "batch norm", "kept", "batch norm + relu", "kept "]


def tables(quick=False):
    import jax.numpy as jnp

    from benchmarks import contestants, pytorch

    rows = []
    for dtype in (jnp.bfloat16, jnp.float32):
        name = jnp.dtype(dtype).name
        for contestant in contestants.installed(inside=True):
            made = contestant.make(contestants.Setting(SHAPE, dtype))
            rows.append([name, contestant.name, *kept(made, dtype, False), *kept(made, dtype, True)])
        if pytorch.installed():
            saved = [summary(pytorch.kept(SHAPE, name, relu), dtype) for relu in (False, True)]
            rows.append([name, "PyTorch", *saved[0], *saved[1]])
    return [Table("Residuals", ABOUT, HEADER, rows)]


def kept(layer, dtype, relu):
    """Bytes that the pullback holds, in sizes of x, and the large ones among them.

    What it holds is what the compiled forward pass would have to write beside y. Parameters and x
    count too: they must stay.
    """
    import jax
    from jax.extend.core import Literal

    from benchmarks import programs

    def pullback(params, x):
        return jax.vjp(lambda p, x: layer.apply(p, layer.state, x, relu=relu)[0], params, x)[1]

    arguments = programs.shapes(layer.params), jax.ShapeDtypeStruct(SHAPE, dtype)
    closed = jax.make_jaxpr(pullback)(*arguments)
    held = {id(var): var.aval for var in closed.jaxpr.outvars if not isinstance(var, Literal)}
    return summary([(aval.shape, aval.dtype.name, aval.dtype.itemsize) for aval in held.values()], dtype)


def summary(held, dtype):
    """All that is held in sizes of x, and the dtypes of what is as large: two cells of the table."""
    import numpy as np

    total = sum(math.prod(shape) * width for shape, _, width in held)
    large = sorted(name for shape, name, _ in held if math.prod(shape) >= math.prod(SHAPE))
    return total / (math.prod(SHAPE) * np.dtype(dtype).itemsize), ", ".join(large)
