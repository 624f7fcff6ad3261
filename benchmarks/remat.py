"""Peak memory and traffic of a training step whose forward pass is partly computed again."""

import functools

from benchmarks.processes import AHEAD, parallel
from benchmarks.tables import Table, missing

DEPTH, SHAPE = 20, (128, 56, 56, 64)
TITLE = "Memory of a training step, H100"
ABOUT = f"""\
Compiled ahead of time, bfloat16, relu inside of the layer: a stack of {DEPTH} times convolution 3x3, batch
norm and relu on {list(SHAPE)}, in sizes of x for each of them, and ResNet-50 at batch 128, in gigabytes. The
peak of temporary memory, and what is moved outside of convolutions. The policy is `jbn.checkpoint_policy`."""
HEADER = ["network", "layer", "computed again", "peak temporary", "moved"]
NOTHING, WHOLE, PLAIN = "nothing", "by the policy, the whole", "each block, without a policy"
STACK, RESNET = "stack", "ResNet-50"
CASES = [
    (STACK, "Flax", NOTHING),
    (STACK, "jbn, relu inside", NOTHING),
    (STACK, "jbn, relu inside", WHOLE),
    (STACK, "Flax", PLAIN),
    (STACK, "jbn, relu inside", PLAIN),
    (RESNET, "Flax", NOTHING),
    (RESNET, "jbn, relu inside", NOTHING),
    (RESNET, "jbn, relu inside", WHOLE),
]


def tables(quick=False):
    from benchmarks import targets

    if reason := targets.missing("H100"):
        return [missing(TITLE, reason)]
    cases = [case for case in CASES if case[0] == STACK or not quick]
    found = parallel(f"{__name__}:measured", cases, AHEAD)
    failed = sorted({one["failed"] for one in found if isinstance(one, dict)})
    rows = [
        [*case, *(one if isinstance(one, list) else (None, None))]
        for case, one in zip(cases, found, strict=True)
    ]
    return [Table(TITLE, " ".join([ABOUT, *failed]), HEADER, rows)]


def measured(network, layer, again):
    """Peak and traffic of one step."""
    from benchmarks import contestants, targets

    step, arguments, unit = (stack if network == STACK else resnet50)(contestants.named(layer), again)
    compiled = targets.compiled(step, arguments, "H100", donate_argnums=(0, 1))
    return [targets.temporary(compiled) / unit, targets.moved(compiled, "H100", library=False) / unit]


def resnet50(contestant, again):
    """The step, its arguments, and in what it is counted."""
    import jax
    import jax.numpy as jnp

    import jbn
    from benchmarks import network, programs, targets

    around = functools.partial(jax.checkpoint, policy=jbn.checkpoint_policy) if again == WHOLE else None
    made = network.ResNet50(contestant, jnp.bfloat16)
    arguments = programs.shapes((made.params, made.state, made.x, made.labels), targets.place("H100"))
    return functools.partial(made.step, around=around), arguments, 1e9


def stack(contestant, again):
    """The step, its arguments, and in what it is counted."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jbn
    from benchmarks import contestants, network, programs, targets

    layer = contestant.make(contestants.Setting(SHAPE, jnp.bfloat16))
    kernel = np.zeros((3, 3, SHAPE[-1], SHAPE[-1]), jnp.bfloat16)

    def block(params, state, x):
        kernel, affine = params
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=network.DIMENSIONS)
        return layer.apply(affine, state, x, relu=True)

    def step(params, states, x):
        def loss(params):
            y, new = x, []
            for one, state in zip(params, states, strict=True):
                y, after = (jax.checkpoint(block) if again == PLAIN else block)(one, state, y)
                new.append(after)
            return jnp.mean(y.astype(jnp.float32) ** 2), new

        if again == WHOLE:
            loss = jax.checkpoint(loss, policy=jbn.checkpoint_policy)
        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - (0.1 * g).astype(p.dtype), params, grads), new, value

    place = targets.place("H100")
    variables = programs.shapes(([(kernel, layer.params)] * DEPTH, [layer.state] * DEPTH), place)
    x = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16, sharding=place)
    return step, [*variables, x], x.size * x.dtype.itemsize * DEPTH
