"""What one layer moves through memory, in passes over x, and its peak of temporary memory."""

import math

from benchmarks.processes import AHEAD, parallel
from benchmarks.tables import Table, missing

SHAPES = ((256, 56, 56, 64), (256, 7, 7, 2048))
DTYPES = ("bfloat16", "float32")
ABOUT = """\
One batch norm, compiled ahead of time. A pass is one read or one write of the whole activation tensor;
{how}. The least that separate kernels can do is 3 forward and 8 with the backward pass; in evaluation it
is 2. `temporary` is the peak of temporary memory of forward + backward, in sizes of x."""
HOW = {
    "H100": "counted instruction by instruction in the compiled program",
    "TPU v5e": "XLA's own estimate (`bytes accessed`), as prefetches by copies look like work, without jbn's "
    "second pass where the running mean is far off, a branch",
}
HEADER = ["x", "dtype", "layer", "evaluation", "forward", "forward + backward", "temporary"]
PROGRAMS = ((False, "forward"), (True, "forward"), (True, "forward + backward"))


def tables(quick=False):
    from benchmarks import targets

    found = []
    for target in HOW:
        title, reason = f"Passes of one layer, {target}", targets.missing(target)
        if reason:
            found.append(missing(title, reason))
            continue
        tasks = [(shape, dtype, target) for shape in SHAPES[quick:] for dtype in DTYPES]
        parts = parallel(f"{__name__}:rows", tasks, AHEAD)
        failures = [part["failed"] for part in parts if isinstance(part, dict)]
        about = " ".join([ABOUT.format(how=HOW[target]), *failures])
        found.append(
            Table(title, about, HEADER, [row for part in parts if isinstance(part, list) for row in part])
        )
    return found


def rows(shape, dtype, target):
    """The lines of the table for one shape, dtype and target."""
    import jax
    import jax.numpy as jnp

    from benchmarks import contestants, programs, targets

    place = targets.place(target)
    x = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=place)
    one_pass, found = math.prod(shape) * x.dtype.itemsize, []
    for contestant in contestants.installed():
        cells = []
        for training, program in PROGRAMS:
            made = contestant.make(contestants.Setting(x.shape, x.dtype, training))
            arguments = [*programs.shapes((made.params, made.state), place), x]
            arguments += [] if program == "forward" else [x]
            compiled = targets.compiled(programs.PROGRAMS[program](made), arguments, target)
            cells.append(targets.moved(compiled, target) / one_pass)
        cells.append(targets.temporary(compiled) / one_pass)
        found.append([str(shape), dtype, contestant.name, *cells])
    return found
