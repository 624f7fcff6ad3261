"""What is kept for the backward pass: of one layer, and at the peak of training steps of whole networks."""

import functools
import math

from benchmarks.processes import AHEAD, parallel
from benchmarks.tables import Table, missing

SHAPE = (64, 32, 32, 64)
ABOUT = f"""\
x of {list(SHAPE)}. What the forward pass keeps for the backward pass, before XLA optimizes, in sizes of
x: all of it, and the dtypes of the arrays as large as x. PyTorch: the tensors that it saves."""
HEADER = ["dtype", "layer", "batch norm", "kept", "batch norm + relu", "kept "]

PEAKS = "Memory of a training step, H100"
ABOUT_PEAKS = """\
Compiled ahead of time, bfloat16: images of 224 x 224 in batches of 128; 16 convolution modules of a Conformer
on [64, 400, 512], with a mask over time; and a stack of 20 times convolution, batch norm and relu on
[128, 56, 56, 64], of which each x has 0.051 GB. The peak of temporary memory; what is moved outside of
convolutions and matrix products; the floating-point operations of the step. relu and residual are inside of
jbn's layer, relu6 and swish outside. `policy` is `jbn.checkpoint_policy` around the whole loss, each stage or
each block; `moments` is `save_only_these_names("jbn_moments")`; `pieces` saves what convolutions make and the
moments, not what is concatenated; `remat` is `jax.checkpoint` without a policy."""
HEADER_PEAKS = ["network", "layer", "computed again", "peak, GB", "moved, GB", "10^12 operations"]
FLAX, JBN = "Flax", "jbn, relu inside"
NOTHING, PIECES = "nothing", "pieces, whole"
CASES = (
    (FLAX, NOTHING),
    (JBN, NOTHING),
    (JBN, "policy, whole"),
    (JBN, "policy, stages"),
    (JBN, "policy, blocks"),
    (JBN, "moments, blocks"),
    (FLAX, "remat, blocks"),
    (JBN, "remat, blocks"),
)
NETWORKS = ("Stack", "ResNet50", "MobileNetV2", "DenseNet121", "Conformer")


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
    return [Table("Residuals", ABOUT, HEADER, rows), peaks(NETWORKS[:1] if quick else NETWORKS)]


def peaks(networks):
    from benchmarks import targets

    if reason := targets.missing("H100"):
        return missing(PEAKS, reason)
    cases = [(network, *case) for network in networks for case in CASES]
    cases += [(network, JBN, PIECES) for network in networks if network == "DenseNet121"]
    found = parallel(f"{__name__}:peak", cases, AHEAD)
    failed = sorted({one["failed"] for one in found if isinstance(one, dict)})
    rows = [
        [*case, *(one if isinstance(one, list) else [None] * 3)]
        for case, one in zip(cases, found, strict=True)
    ]
    rows.sort(key=lambda row: networks.index(row[0]))
    return Table(PEAKS, " ".join([ABOUT_PEAKS, *failed]), HEADER_PEAKS, rows)


def peak(name, layer, again):
    """Of one step: the peak and what is moved, in gigabytes, and the operations."""
    import jax
    import jax.numpy as jnp

    from benchmarks import contestants, network, programs, targets

    around = {} if again == NOTHING else wrapped(*again.split(", "))
    made = getattr(network, name)(contestants.named(layer), jnp.bfloat16, around=around)
    arguments = made.params, made.state, *made.inputs
    compiled = targets.compiled(
        made.step, programs.shapes(arguments, targets.place("H100")), "H100", donate_argnums=(0, 1)
    )
    # Before XLA, of the program for a CPU: it tells no number of those of a GPU's program.
    operations = jax.jit(made.step).lower(*programs.shapes(arguments)).cost_analysis()["flops"]
    moved = targets.moved(compiled, "H100", library=False)
    return [targets.temporary(compiled) / 1e9, moved / 1e9, operations / 1e12]


def wrapped(how, parts):
    """What `benchmarks.network` wraps such parts of a network in."""
    import jax

    import jbn
    from benchmarks.network import DenseNet121

    saves = jax.checkpoint_policies.save_only_these_names
    policies = {
        "policy": jbn.checkpoint_policy,
        "moments": saves("jbn_moments"),
        "pieces": saves(DenseNet121.PIECE, "jbn_moments"),
        "remat": None,
    }
    return {parts.removesuffix("s"): functools.partial(jax.checkpoint, policy=policies[how])}


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
