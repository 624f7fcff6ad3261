"""How far y and the gradient of x are from float64, for data near 0 and far from it."""

import numpy as np

from benchmarks.contestants import EPSILON
from benchmarks.tables import Table

SHAPE, QUICK_SHAPE = (64, 28, 28, 64), (32, 8, 8, 8)
MEANS = (0.0, 1e3, 1e4)
ABOUT = """\
Largest error of y, and of dx in sizes of the largest dx, against float64 for the same float32 x of
{shape}, drawn from N(mean, 1). Training, first step: the running statistics are as they were made. y has
values of up to 5 or 6."""


def tables(quick=False):
    shape, results = QUICK_SHAPE if quick else SHAPE, {}
    random = np.random.default_rng(0)
    dy = random.standard_normal(shape).astype(np.float32)
    for mean in MEANS:
        x = (mean + random.standard_normal(shape)).astype(np.float32)
        exact = reference(x, dy)
        for name, (y, dx) in outcomes(x, dy).items():
            results.setdefault(name, []).extend([error(y, exact[0], 1.0), error(dx, exact[1], None)])
    header = ["layer", *(f"{what}, N({mean:g}, 1)" for mean in MEANS for what in ("y", "dx"))]
    rows = [[name, *(f"{value:.1e}" for value in values)] for name, values in results.items()]
    return [Table("Accuracy", ABOUT.format(shape=list(shape)), header, rows)]


def outcomes(x, dy):
    """{contestant: (y, dx)} in training, as NumPy arrays."""
    import jax

    from benchmarks import contestants, programs, pytorch

    found = {}
    for one in contestants.installed():
        made = one.make(contestants.Setting(x.shape, x.dtype))
        y, _, (_, dx) = jax.jit(programs.with_gradients(made))(made.params, made.state, x, dy)
        found[one.name] = np.asarray(y), np.asarray(dx)
    if pytorch.installed():
        layer = pytorch.Layer(x.shape, x.dtype.name)
        y, (dx, *_) = layer.step(layer.tensor(x), layer.tensor(dy))
        found["PyTorch"] = layer.array(y), layer.array(dx)
    return found


def reference(x, dy):
    """y and dx in float64, with scale 1 and bias 0."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    axes = tuple(range(x.ndim - 1))
    offset = x - x.mean(axes)
    r = 1 / np.sqrt((offset**2).mean(axes) + EPSILON)
    y = offset * r
    return y, r * (dy - dy.mean(axes) - y * (dy * y).mean(axes))


def error(value, exact, unit):
    return float(np.abs(value - exact).max() / (unit or np.abs(exact).max()))
