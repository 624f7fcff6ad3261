"""Error texts of the options in full: alone, and where two of them do not go together."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
import jbn.nnx
import jbn.tools
from tests.error_texts.core import PARAMS, STATS, X, call

COUNTED = jbn.init(3, count=True)[1]
Z = (X + 1j).astype(np.complex64)
COMPLEX = STATS | {"mean": jnp.zeros(3, jnp.complex64)}


def over_devices(**settings):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        call(x=jax.device_put(X, NamedSharding(mesh, P("data"))), **settings)


TEXTS = {
    "cumulative without rows": (
        lambda: call(momentum=None),
        "jbn.batch_norm: batch_stats is a mapping with mean, var. Expected rows for momentum=None. "
        "Begin with it: layers make it in init, and jbn.init(features, count=True) does.",
    ),
    "update, cumulative without rows": (
        lambda: jbn.update(STATS, jbn.moments(X), momentum=None),
        "jbn.update: batch_stats is a mapping with mean, var. Expected rows for momentum=None. Begin "
        "with it: layers make it in init, and jbn.init(features, count=True) does.",
    ),
    "debias without a count": (
        lambda: call(debias=True),
        "jbn.batch_norm: batch_stats is a mapping with mean, var. Expected count for debias=True. "
        "Begin with it: layers make it in init, and jbn.init(features, count=True) does.",
    ),
    "debias in evaluation without a count": (
        lambda: call(debias=True, use_running_average=True),
        "jbn.batch_norm: batch_stats is a mapping with mean, var. Expected count for debias=True. "
        "Begin with it: layers make it in init, and jbn.init(features, count=True) does.",
    ),
    "linen: debias of a checkpoint without a count": (
        lambda: jbn.linen.BatchNorm(use_running_average=True, debias=True).apply(
            {"params": PARAMS, "batch_stats": STATS}, X
        ),
        "jbn.linen.BatchNorm: batch_stats is a mapping with mean, var. Expected count for "
        "debias=True. Begin with it: layers make it in init, and jbn.init(features, count=True) does.",
    ),
    "debias with a momentum that changes": (
        lambda: call(batch_stats=COUNTED, debias=True, momentum=jnp.float32(0.9)),
        "jbn.batch_norm: momentum is float32[], to debias with. Expected a number, or None. What is "
        "left of the initial statistics is known for a momentum that stays the same.",
    ),
    "debias with a mask of channels": (
        lambda: call(batch_stats=COUNTED, debias=True, mask=np.ones((8, 1, 3), bool)),
        "jbn.batch_norm: mask is bool[8,1,3] with debias=True. Expected one for all channels. count "
        "is one number for all of them: use momentum=None, which counts by channel.",
    ),
    "a traced choice": (
        lambda: jax.jit(lambda flag: call(unbiased=flag))(True),
        "jbn.batch_norm: unbiased is bool[]. Expected True or False. Under jit make it static, "
        "jax.jit(..., static_argnames='unbiased'), or close over it.",
    ),
    "update, a traced choice": (
        lambda: jax.jit(lambda flag: jbn.update(STATS, jbn.moments(X), unbiased=flag))(True),
        "jbn.update: unbiased is bool[]. Expected True or False. Under jit make it static, "
        "jax.jit(..., static_argnames='unbiased'), or close over it.",
    ),
    "a choice of text": (
        lambda: call(skip_nonfinite="yes"),
        "jbn.batch_norm: skip_nonfinite is 'yes'. Expected True or False. Under jit make it static, "
        "jax.jit(..., static_argnames='skip_nonfinite'), or close over it.",
    ),
    "groups of no examples": (
        lambda: call(virtual_batch_size=0),
        "jbn.batch_norm: virtual_batch_size is 0. Expected a static int from 1 up, or None. Usually "
        "32 to 256.",
    ),
    "groups of a traced size": (
        lambda: jax.jit(lambda size: call(virtual_batch_size=size))(2),
        "jbn.batch_norm: virtual_batch_size is int32[]. Expected a static int from 1 up, or None. "
        "Usually 32 to 256.",
    ),
    "groups that do not divide the batch": (
        lambda: call(virtual_batch_size=3),
        "jbn.batch_norm: virtual_batch_size is 3 for x = float32[8,4,3]. Expected a divisor of the 8 "
        "examples. Drop the last batch of an epoch, or pad it to the full size and pass mask.",
    ),
    "groups larger than the batch": (
        lambda: call(virtual_batch_size=16),
        "jbn.batch_norm: virtual_batch_size is 16 for x = float32[8,4,3]. Expected a divisor of the 8"
        " examples. Drop the last batch of an epoch, or pad it to the full size and pass mask.",
    ),
    "groups of features alone": (
        lambda: call(x=X[0, 0], virtual_batch_size=1, mask=np.ones(3, bool)),
        "jbn.batch_norm: virtual_batch_size is 1 for x = float32[3]. Expected a divisor of the 0 "
        "examples. Drop the last batch of an epoch, or pad it to the full size and pass mask.",
    ),
    "groups of one value": (
        lambda: call(x=X[:, 0], virtual_batch_size=1),
        "jbn.batch_norm: virtual_batch_size is 1 for x = float32[8,3], one value per channel. "
        "Expected groups of at least two values per channel in training. A single value has no "
        "variance and would turn into bias: use larger groups.",
    ),
    "renorm that is none": (
        lambda: call(renorm=(3.0, 5.0)),
        "jbn.batch_norm: renorm is (3.0, 5.0). Expected jbn.Renorm(r_max, d_max) with scalars, r_max "
        "from 1 and d_max from 0 up. The paper ends at jbn.Renorm(3.0, 5.0).",
    ),
    "renorm below one": (
        lambda: call(renorm=jbn.Renorm(0.5, 0.0)),
        "jbn.batch_norm: renorm is Renorm(r_max=0.5, d_max=0.0, r_min=None). Expected jbn.Renorm(r_max, "
        "d_max) with scalars, r_max from 1 and d_max from 0 up. The paper ends at jbn.Renorm(3.0, 5.0).",
    ),
    "renorm below zero": (
        lambda: call(renorm=jbn.Renorm(1.0, -1.0)),
        "jbn.batch_norm: renorm is Renorm(r_max=1.0, d_max=-1.0, r_min=None). Expected jbn.Renorm(r_max, "
        "d_max) with scalars, r_max from 1 and d_max from 0 up. The paper ends at jbn.Renorm(3.0, 5.0).",
    ),
    "renorm per channel": (
        lambda: call(renorm=jbn.Renorm(jnp.ones(3), 0.0)),
        "jbn.batch_norm: renorm is Renorm(r_max=Array([1., 1., 1.], dtype=float32), d_max=0.0, r_min=None). "
        "Expected jbn.Renorm(r_max, d_max) with scalars, r_max from 1 and d_max from 0 up. The paper "
        "ends at jbn.Renorm(3.0, 5.0).",
    ),
    "renorm without statistics": (
        lambda: call(batch_stats=None, renorm=jbn.Renorm(3.0, 5.0)),
        "jbn.batch_norm: renorm is given, and batch_stats is None. Expected running statistics to "
        "correct towards. Pass the batch_stats of jbn.init, or leave renorm out.",
    ),
    "renorm with an r_min above one": (
        lambda: call(renorm=jbn.Renorm(3.0, 5.0, 1.5)),
        "jbn.batch_norm: renorm is given with r_min = 1.5. Expected a scalar r_min from 0 to 1, or None. "
        "None is 1 / r_max, as in the paper.",
    ),
    "blend above one": (
        lambda: call(blend=1.5),
        "jbn.batch_norm: blend is 1.5. Expected a number from 0 to 1, a scalar array, or None. It weighs the "
        "running statistics: 1 leaves the batch out.",
    ),
    "blend without statistics": (
        lambda: call(batch_stats=None, blend=0.5),
        "jbn.batch_norm: blend is given, and batch_stats is None. Expected running statistics to blend with. "
        "Pass the batch_stats of jbn.init, or leave blend out.",
    ),
    "return_moments that is traced": (
        lambda: jax.jit(lambda flag: call(return_moments=flag))(True),
        "jbn.batch_norm: return_moments is bool[]. Expected True or False. Under jit make it static, "
        "jax.jit(..., static_argnames='return_moments'), or close over it.",
    ),
    "renorm of complex numbers": (
        lambda: call(x=Z, batch_stats=COMPLEX, renorm=jbn.Renorm(3.0, 5.0)),
        "jbn.batch_norm: renorm is given for x = complex64[8,4,3]. Expected real x. No paper says "
        "how to clip a complex d.",
    ),
    "an activation by another name": (
        lambda: call(activation="gelu"),
        "jbn.batch_norm: activation is 'gelu'. Expected None, 'relu', or a function of each entry of a real "
        "array, such as jax.nn.silu. Pass the function itself, as in jax.nn.gelu.",
    ),
    "relu of complex numbers": (
        lambda: call(x=Z, batch_stats=COMPLEX, activation="relu"),
        "jbn.batch_norm: activation is the function relu for y of complex64. Expected None, 'relu', or a "
        "function of each entry of a real array, such as jax.nn.silu. Apply it to y.",
    ),
    "an activation of whole rows": (
        lambda: call(activation=jax.nn.softmax),
        "jbn.batch_norm: activation is the function softmax, in which reduce_max may combine or move "
        "entries. Expected None, 'relu', or a function of each entry of a real array, such as jax.nn.silu. "
        "Apply it to y.",
    ),
    "an activation without a hash": (
        lambda: call(activation=nn.Dense(3, parent=None).clone(kernel_init=[])),
        "jbn.batch_norm: activation is the function Dense, which has no hash. Expected None, 'relu', or a "
        "function of each entry of a real array, such as jax.nn.silu. Apply it to y.",
    ),
    "an activation that fits one shape": (
        lambda: call(activation=functools.partial(np.dot, b=np.eye(3, dtype=np.float32))),
        "jbn.batch_norm: activation is the function dot, which raises TracerArrayConversionError for "
        "float32[3,5]. Expected None, 'relu', or a function of each entry of a real array, such as "
        "jax.nn.silu. It has to be JAX's and take any shape: apply it to y.",
    ),
    "an activation of another dtype": (
        lambda: call(activation=jnp.isfinite),
        "jbn.batch_norm: activation is the function isfinite, which makes bool[3,5] of float32[3,5]. "
        "Expected None, 'relu', or a function of each entry of a real array, such as jax.nn.silu. Apply "
        "what changes shape or dtype to y.",
    ),
    "an activation with parameters": (
        lambda: call(activation=jax.tree_util.Partial(jax.nn.leaky_relu, negative_slope=jnp.ones(()))),
        "jbn.batch_norm: activation is the function leaky_relu, which holds arrays. Expected None, 'relu', "
        "or a function of each entry of a real array, such as jax.nn.silu. They get no gradient here: "
        "apply it to y.",
    ),
    "an activation with a traced slope": (
        lambda: jax.grad(lambda a: jnp.sum(call(activation=lambda y: a * y)[0]))(1.0),
        "jbn.batch_norm: activation is the function <lambda>, which closes over traced arrays. Expected "
        "None, 'relu', or a function of each entry of a real array, such as jax.nn.silu. They get no "
        "gradient here: apply it to y.",
    ),
    "a residual of another shape": (
        lambda: call(residual=X[:4]),
        "jbn.batch_norm: residual is float32[4,4,3] for x = float32[8,4,3]. Expected an array of as "
        "many axes, each 1 or x's size, and complex only if y is. It is added to y: project it to y's"
        " shape first.",
    ),
    "a residual of lower rank": (
        lambda: call(residual=X[0]),
        "jbn.batch_norm: residual is float32[4,3] for x = float32[8,4,3]. Expected an array of as "
        "many axes, each 1 or x's size, and complex only if y is. It is added to y: project it to y's"
        " shape first.",
    ),
    "a residual of text": (
        lambda: call(residual="x"),
        "jbn.batch_norm: residual is 'x' for x = float32[8,4,3]. Expected an array of as many axes, "
        "each 1 or x's size, and complex only if y is. It is added to y: project it to y's shape "
        "first.",
    ),
    "a complex residual": (
        lambda: call(residual=Z),
        "jbn.batch_norm: residual is complex64[8,4,3] for x = float32[8,4,3]. Expected an array of as"
        " many axes, each 1 or x's size, and complex only if y is. It is added to y: project it to "
        "y's shape first.",
    ),
    "debias from initial statistics of one's own": (
        lambda: jbn.linen.BatchNorm(
            use_running_average=False, debias=True, mean_init=nn.initializers.ones
        ).init(jax.random.key(0), X),
        "jbn.linen.BatchNorm: debias is True with a mean_init or var_init of your own. Expected "
        "initial statistics 0 and 1, which debiased evaluation divides out. Leave one of them out.",
    ),
    "nnx: debias from initial statistics of one's own": (
        lambda: jbn.nnx.BatchNorm(3, debias=True, var_init=nn.initializers.zeros, rngs=nnx.Rngs(0)),
        "jbn.nnx.BatchNorm of 3 features: debias is True with a mean_init or var_init of your own. "
        "Expected initial statistics 0 and 1, which debiased evaluation divides out. Leave one of "
        "them out.",
    ),
    "groups that lie on two devices": (
        lambda: over_devices(virtual_batch_size=4),
        "jbn.batch_norm: virtual_batch_size is 4, 2 groups on 4 devices. Expected groups that lie on "
        "one device each. Use 2 or a divisor of it: the mesh axes of x are explicit.",
    ),
    "a count that is a float": (
        lambda: call(batch_stats=COUNTED | {"count": jnp.float32(1)}),
        "jbn.batch_norm: batch_stats['count'] is float32[]. Expected an integer dtype. Averages are "
        "kept in float32, the number of updates in int32.",
    ),
    "update by what are no moments": (
        lambda: jbn.update(STATS, 3),
        "jbn.update: moments is 3. Expected jbn.Moments. Measure x: jbn.moments(x).",
    ),
    "update by what a checkpoint makes of moments": (
        lambda: jbn.update(STATS, {"count": 2, "mean": 0, "var": 1}),
        "jbn.update: moments is {'count': 2, 'mean': 0, 'var': 1}. Expected jbn.Moments. A checkpoint may "
        "give a mapping back: jbn.Moments(**found).",
    ),
    "debias a model that does not count": (
        lambda: jbn.tools.debias({"batch_stats": STATS}),
        "jbn.tools.debias: variables is a model whose batch norms have no count. Expected one that counts "
        "its updates. Layers with debias=True keep a count.",
    ),
    "debias no layer": (
        lambda: jbn.tools.debias({"batch_stats": {"bn": COUNTED}}, momentum={}),
        "jbn.tools.debias: momentum is given for no layer. Expected those of batch norms with a count: bn. "
        "Layers with debias=True keep a count.",
    ),
    "debias by a variable of NNX": (
        lambda: jbn.tools.debias({"batch_stats": COUNTED}, momentum=nnx.Variable(jnp.float32(0.9))),
        "jbn.tools.debias: momentum is float32[], to debias with. Expected a number, or None. What is"
        " left of the initial statistics is known for a momentum that stays the same.",
    ),
    "debias by a schedule": (
        lambda: jbn.tools.debias({"batch_stats": COUNTED}, momentum=jnp.float32(0.9)),
        "jbn.tools.debias: momentum is float32[], to debias with. Expected a number, or None. What is"
        " left of the initial statistics is known for a momentum that stays the same.",
    ),
    "apply_moments, a choice of text": (
        lambda: jbn.tools.apply_moments({"batch_stats": STATS}, {"": jbn.moments(X)}, unbiased="no"),
        "jbn.tools.apply_moments: unbiased is 'no'. Expected True or False. Under jit make it static,"
        " jax.jit(..., static_argnames='unbiased'), or close over it.",
    ),
}
