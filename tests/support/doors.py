"""The three ways in, as one function each: the pure function and the two layers, with the same arguments.

y, new_batch_stats = door(params, batch_stats, x, evaluating, **call_and_options)
"""

import jax
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from tests.support.cases import loosely

CALL = ("mask", "residual")


def core(params, batch_stats, x, evaluating=False, **settings):
    return jbn.batch_norm(params, batch_stats, x, use_running_average=evaluating, **settings)


def linen(params, batch_stats, x, evaluating=False, **settings):
    call = {name: settings.pop(name) for name in CALL if name in settings}
    layer = jbn.linen.BatchNorm(use_scale="scale" in params, use_bias="bias" in params, **settings)
    variables = {"params": params, "batch_stats": batch_stats}
    y, new = layer.apply(variables, x, use_running_average=evaluating, mutable=["batch_stats"], **call)
    return y, new["batch_stats"]


def of_nnx(params, batch_stats, x, evaluating=False, **settings):
    call = {name: settings.pop(name) for name in CALL if name in settings}
    features = np.shape(batch_stats["mean"])[0]
    layer = jbn.nnx.BatchNorm(
        features, use_scale="scale" in params, use_bias="bias" in params, rngs=nnx.Rngs(0), **settings
    )
    for name, value in {**params, **batch_stats}.items():
        if getattr(layer, name) is not None:
            getattr(layer, name).set_value(jax.numpy.asarray(value))
    with loosely():
        y = layer(x, use_running_average=evaluating, **call)
    kept = {name: getattr(layer, name) for name in ("mean", "var", "count", "rows")}
    return y, {name: variable[...] for name, variable in kept.items() if variable is not None}


DOORS = {"core": core, "linen": linen, "nnx": of_nnx}
every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
