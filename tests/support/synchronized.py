"""A layer synchronized over the axis `data`, as a function and in linen, and a batch for eight devices."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import jbn
import jbn.linen
from tests.support.cases import tolerance

PARAMS, BATCH_STATS = jbn.init(4)
X = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
COTANGENT = np.random.default_rng(1).standard_normal((64, 4)).astype(np.float32)
TOLERANCE = tolerance(np.float32)


def core(params, x, training=True, axis_name="data", **settings):
    return jbn.batch_norm(
        params, BATCH_STATS, x, use_running_average=not training, axis_name=axis_name, **settings
    )


def linen(params, x, training=True, axis_name="data", **settings):
    layer = jbn.linen.BatchNorm(use_running_average=not training, axis_name=axis_name, **settings)
    y, new = layer.apply({"params": params, "batch_stats": BATCH_STATS}, x, mutable=["batch_stats"])
    return y, new["batch_stats"]


def gradients(apply, params, x, cotangent, **settings):
    y, pullback, new = jax.vjp(functools.partial(apply, **settings), params, x, has_aux=True)
    return y, new, pullback(cotangent)


both = pytest.mark.parametrize("apply", [core, linen])


def mesh(devices=8):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
