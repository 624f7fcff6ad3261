"""Error texts of the options in full: alone, and where two of them do not go together."""

import jax
import jax.numpy as jnp
import numpy as np

import jbn
import jbn.linen
from tests.texts_core import PARAMS, STATS, X, call

COUNTED = jbn.init(3, count=True)[1]
Z = (X + 1j).astype(np.complex64)
COMPLEX = STATS | {"mean": jnp.zeros(3, jnp.complex64)}


TEXTS = {
    "cumulative without rows": (
        lambda: call(momentum=None),
        "jbn.batch_norm: batch_stats is a mapping with mean, var. Expected rows for momentum=None. "
        "Make them with jbn.init(features, count=True).",
    ),
    "update, cumulative without rows": (
        lambda: jbn.update(STATS, jbn.moments(X), momentum=None),
        "jbn.update: batch_stats is a mapping with mean, var. Expected rows for momentum=None. Make "
        "them with jbn.init(features, count=True).",
    ),
    "debias without a count": (
        lambda: call(debias=True),
        "jbn.batch_norm: batch_stats is a mapping with mean, var. Expected count for debias=True. "
        "Make them with jbn.init(features, count=True).",
    ),
    "debias in evaluation without a count": (
        lambda: call(debias=True, use_running_average=True),
        "jbn.batch_norm: batch_stats is a mapping with mean, var. Expected count for debias=True. "
        "Make them with jbn.init(features, count=True).",
    ),
    "linen: debias of a checkpoint without a count": (
        lambda: jbn.linen.BatchNorm(use_running_average=True, debias=True).apply(
            {"params": PARAMS, "batch_stats": STATS}, X
        ),
        "jbn.linen.BatchNorm: batch_stats is a mapping with mean, var. Expected count for "
        "debias=True. Make them with jbn.init(features, count=True).",
    ),
    "debias with a momentum that changes": (
        lambda: call(batch_stats=COUNTED, debias=True, momentum=jnp.float32(0.9)),
        "jbn.batch_norm: momentum is float32[] with debias=True. Expected a number, or None. What is "
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
        "jbn.batch_norm: renorm is Renorm(r_max=0.5, d_max=0.0). Expected jbn.Renorm(r_max, d_max) "
        "with scalars, r_max from 1 and d_max from 0 up. The paper ends at jbn.Renorm(3.0, 5.0).",
    ),
    "renorm below zero": (
        lambda: call(renorm=jbn.Renorm(1.0, -1.0)),
        "jbn.batch_norm: renorm is Renorm(r_max=1.0, d_max=-1.0). Expected jbn.Renorm(r_max, d_max) "
        "with scalars, r_max from 1 and d_max from 0 up. The paper ends at jbn.Renorm(3.0, 5.0).",
    ),
    "renorm per channel": (
        lambda: call(renorm=jbn.Renorm(jnp.ones(3), 0.0)),
        "jbn.batch_norm: renorm is Renorm(r_max=Array([1., 1., 1.], dtype=float32), d_max=0.0). "
        "Expected jbn.Renorm(r_max, d_max) with scalars, r_max from 1 and d_max from 0 up. The paper "
        "ends at jbn.Renorm(3.0, 5.0).",
    ),
    "renorm without statistics": (
        lambda: call(batch_stats=None, renorm=jbn.Renorm(3.0, 5.0)),
        "jbn.batch_norm: renorm is given, and batch_stats is None. Expected running statistics to "
        "correct towards. Pass the batch_stats of jbn.init, or leave renorm out.",
    ),
    "renorm of complex numbers": (
        lambda: call(x=Z, batch_stats=COMPLEX, renorm=jbn.Renorm(3.0, 5.0)),
        "jbn.batch_norm: renorm is given for x = complex64[8,4,3]. Expected real x. How to clip a "
        "complex d, no paper says.",
    ),
    "another activation": (
        lambda: call(activation="gelu"),
        "jbn.batch_norm: activation is gelu for y of float32. Expected None, or 'relu' for a real y. "
        "Apply any other function to y.",
    ),
    "an activation that is a function": (
        lambda: call(activation=jax.nn.relu),
        "jbn.batch_norm: activation is no text for y of float32. Expected None, or 'relu' for a real "
        "y. Apply any other function to y.",
    ),
    "relu of complex numbers": (
        lambda: call(x=Z, batch_stats=COMPLEX, activation="relu"),
        "jbn.batch_norm: activation is relu for y of complex64. Expected None, or 'relu' for a real "
        "y. Apply any other function to y.",
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
}
