"""Real times on a GPU, held against the bandwidth of a large copy measured in the same run."""

import functools
import math
from statistics import median

from benchmarks import timing
from benchmarks.tables import Table, missing

TITLE = "GPU times"
SHAPES = ((256, 56, 56, 64), (256, 7, 7, 2048))
DTYPES = ("bfloat16", "float32")
ROUNDS, CALLS = 20, 10
COPY_BYTES = 2**30
ABOUT = """\
{device}: {program} of one layer in training; milliseconds, medians of {rounds} rounds of {calls} calls
each, interleaved in one process; in brackets the passes over x that a copy makes in that time. The copy
reads and writes {size:.0f} MB, at {bandwidth:.0f} GB/s together."""


def tables(quick=False):
    import jax

    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda", "rocm"):
        return [missing(TITLE, f"JAX finds no GPU on this machine, only {device.platform}.")]
    return measured(device, SHAPES, 3 if quick else ROUNDS, COPY_BYTES)


def measured(device, shapes, rounds, copy_bytes):
    """A table for each program; runs on any device."""
    bandwidth = (
        2 * copy_bytes / median(timing.interleaved({"copy": copy(copy_bytes)}, rounds)["copy"]) * CALLS
    )
    found = []
    for program in ("forward", "forward + backward"):
        rows = []
        for shape in shapes:
            for dtype in DTYPES:
                times = timing.interleaved(runs(shape, dtype, program), rounds)
                one_pass = math.prod(shape) * (2 if dtype == "bfloat16" else 4)
                cells = {
                    name: cell(median(spent) / CALLS, one_pass / bandwidth) for name, spent in times.items()
                }
                rows.append([str(list(shape)), dtype, *cells.values()])
        facts = {"device": device.device_kind, "program": program, "rounds": rounds, "calls": CALLS}
        about = ABOUT.format(**facts, size=copy_bytes / 1e6, bandwidth=bandwidth / 1e9)
        found.append(Table(f"{TITLE}, {program}", about, ["x", "dtype", *cells], rows))
    return found


def cell(seconds, seconds_of_a_pass):
    return f"{1e3 * seconds:.3f} [{seconds / seconds_of_a_pass:.1f}]"


def copy(size):
    """A function that makes `CALLS` copies of an array of so many bytes, and waits."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(size // 4, jnp.float32)
    negative = jax.jit(lambda x: -x)  # a plain copy could be elided
    return functools.partial(several, negative, x)


def several(function, *arguments):
    """Calls are sent one after the other without waiting, so that what launching costs is hidden."""
    import jax

    for _ in range(CALLS):
        result = function(*arguments)
    jax.block_until_ready(result)


def runs(shape, dtype, program):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import contestants, programs

    random = np.random.default_rng(0)
    arrays = [random.standard_normal(shape, np.float32) for _ in range(2)]
    x, dy = (jnp.asarray(array, dtype) for array in arrays)
    found = {}
    for one in contestants.installed():
        made = one.make(contestants.Setting(shape, x.dtype))
        make = programs.forward if program == "forward" else programs.with_gradients
        arguments = [x] if program == "forward" else [x, dy]
        found[one.name] = functools.partial(several, jax.jit(make(made)), made.params, made.state, *arguments)
    return found | pytorch_run(arrays, dtype, program)


def pytorch_run(arrays, dtype, program):
    from benchmarks import pytorch

    if not pytorch.installed():
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    layer = pytorch.Layer(arrays[0].shape, dtype, device="cuda")
    x, dy = map(layer.tensor, arrays)

    def run():
        for _ in range(CALLS):
            layer.forward(x) if program == "forward" else layer.step(x, dy)
        torch.cuda.synchronize()

    return {"PyTorch": run}
