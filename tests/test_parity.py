"""Parity with Flax's linen layer over the full product of its options: values, statistics and dtypes.

One program per triple of dtypes computes all the other combinations, which keeps compilations few.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn.linen
from tests.cases import assert_close, assert_trees_close, tolerance

X = np.random.default_rng(0).standard_normal((4, 3, 5)).astype(np.float32)
MASK = np.random.default_rng(2).random((4, 3, 1)) < 0.7
OPTIONS = list(itertools.product([True, False], [True, False], [-1, 1], [True, False], [True, False]))
NAMES = ("use_scale", "use_bias", "axis", "masked", "train")


def variables(use_scale, use_bias, axis, param_dtype):
    features, rng = X.shape[axis], np.random.default_rng(3)
    params = {}
    if use_scale:
        params["scale"] = jnp.asarray(rng.uniform(0.5, 1.5, features), param_dtype)
    if use_bias:
        params["bias"] = jnp.asarray(rng.standard_normal(features), param_dtype)
    stats = {"mean": rng.standard_normal(features), "var": rng.uniform(0.5, 1.5, features)}
    return {"params": params, "batch_stats": {k: jnp.asarray(v, jnp.float32) for k, v in stats.items()}}


def everything(kind, dtype, param_dtype, x, **settings):
    """y and the new statistics, for each of OPTIONS."""
    results = []
    for use_scale, use_bias, axis, masked, train in OPTIONS:
        layer = kind(not train, axis, 0.9, 1e-3, dtype, param_dtype, use_bias, use_scale, **settings)
        full = variables(use_scale, use_bias, axis, param_dtype)
        y, new = layer.apply(full, x, mask=jnp.asarray(MASK) if masked else None, mutable=["batch_stats"])
        used = jnp.asarray(MASK if masked else np.ones_like(MASK))
        results.append((jnp.where(used, y, jnp.zeros_like(y)), new["batch_stats"]))
    return results


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_parity_with_flax(x_dtype, dtype, param_dtype):
    x = jnp.asarray(X, x_dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = jax.jit(lambda x: everything(nn.BatchNorm, dtype, param_dtype, x, use_fast_variance=False))(
            x
        )
    ours = jax.jit(lambda x: everything(jbn.linen.BatchNorm, dtype, param_dtype, x))(x)
    for option, (our_y, our_new), (y, new) in zip(OPTIONS, ours, theirs, strict=True):
        combination = dict(zip(NAMES, option, strict=True))
        assert our_y.dtype == y.dtype, combination
        assert_close(our_y, y, tolerance(y.dtype))
        assert_trees_close(our_new, new, tolerance(np.float32))
