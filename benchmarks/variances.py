"""Draws how far the measured variance is from float64, for jbn's and Flax's layer, into variances.png.

    python -m benchmarks.variances

Left, 8192 rows of N(offset, 1) on one device. Right, eight devices, of which each has fewer rows than the
one before, and a mean that is larger by 1. x is float32 of 64 channels; of their relative errors the largest
is drawn.
"""

import functools
import pathlib

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import jbn.linen

PICTURE = pathlib.Path(__file__).with_suffix(".png")
LAYERS = {"Flax's default": nn.BatchNorm, "jbn": jbn.linen.BatchNorm}
COLORS = {"Flax's default": "tab:red", "jbn": "tab:blue"}
OFFSETS = np.logspace(0, 6, 25)
DEVICES, ROWS, CHANNELS = 8, 1024, 64


def errors(offsets):
    """{layer: (errors on one device, errors on eight)}, one error for each offset."""
    noise = np.random.default_rng(0).standard_normal((DEVICES, ROWS, CHANNELS))
    device = np.arange(DEVICES)
    rows = np.arange(ROWS) < (ROWS - 120 * device)[:, None]
    mask = np.broadcast_to(rows[..., None], noise.shape)  # as Flax takes it
    alone = [(noise + offset).astype(np.float32).reshape(-1, CHANNELS) for offset in offsets]
    cut = [(noise + offset + device[:, None, None]).astype(np.float32) for offset in offsets]
    found = {}
    for name, layer in LAYERS.items():
        on_one, on_eight = (jax.jit(functools.partial(one, layer)) for one in (measured, measured_on_devices))
        found[name] = (
            [relative(on_one(x), x) for x in alone],
            [relative(on_eight(x, mask), x[rows]) for x in cut],
        )
    return found


def measured(layer, x, mask=None, axis_name=None):
    """The variance of each channel that the layer stores."""
    one = layer(use_running_average=False, momentum=0.0, axis_name=axis_name)
    _, new = one.apply(one.init(jax.random.key(0), x), x, mask=mask, mutable=["batch_stats"])
    return new["batch_stats"]["var"]


def measured_on_devices(layer, x, mask):
    return jax.vmap(functools.partial(measured, layer, axis_name="data"), axis_name="data")(x, mask)[0]


def relative(var, rows):
    exact = rows.var(axis=0, dtype=np.float64)
    return float(np.max(np.abs(np.asarray(var) - exact) / exact))


def draw(offsets, found, path):
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    titles = "one device", "eight devices with unequal counts"
    for position, (axes, title) in enumerate(zip(figure.subplots(1, 2, sharey=True), titles, strict=True)):
        for name, of_layer in found.items():
            # Below one float32 rounding nothing is to be seen, and a logarithm has no 0.
            values = np.maximum(of_layer[position], 1e-8)
            axes.loglog(offsets, values, color=COLORS[name], label=name, linewidth=2)
        axes.axhline(1, color="0.8", linewidth=1, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(title=title, xlabel="mean of the data, in standard deviations")
    figure.axes[0].set_ylabel("relative error of the variance")
    figure.axes[0].legend(frameon=False, loc="center left")
    figure.savefig(path, dpi=90)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    draw(OFFSETS, errors(OFFSETS), PICTURE)
    print(f"{PICTURE} is drawn")
