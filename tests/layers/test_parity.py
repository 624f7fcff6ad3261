"""Parity with Flax's layers over the full product of their options: values, statistics and dtypes.

In each direction: what Flax trained is evaluated by ours, and what ours trained is evaluated by Flax. One
program per triple of dtypes computes all the other combinations, which keeps compilations few.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn.linen
import jbn.nnx
from tests.support.cases import assert_close, assert_trees_close, loosely, tolerance

# Of few bits, for Flax's NNX layer rounds x to `dtype` before it measures it.
X = np.random.default_rng(0).standard_normal((4, 3, 5)).astype(jnp.bfloat16).astype(np.float32) * 4
MASK = np.random.default_rng(2).random((4, 3, 1)) < 0.7
OPTIONS = list(itertools.product([True, False], [True, False], [-1, 1], [True, False]))
NAMES = ("use_scale", "use_bias", "axis", "masked")


def variables(use_scale, use_bias, axis, param_dtype, x):
    features, rng = X.shape[axis], np.random.default_rng(3)
    params = {}
    if use_scale:
        params["scale"] = jnp.asarray(rng.uniform(0.5, 1.5, features), param_dtype)
    if use_bias:
        params["bias"] = jnp.asarray(rng.standard_normal(features), param_dtype)
    stats = {"mean": rng.standard_normal(features), "var": rng.uniform(0.5, 1.5, features)}
    stats = {name: jnp.asarray(value, jnp.float32) for name, value in stats.items()}
    if jnp.iscomplexobj(x):
        stats["mean"] = stats["mean"].astype(jnp.complex64)
    return {"params": params, "batch_stats": stats}


def linen(kind, full, x, mask, train, axis, **settings):
    layer = kind(not train, axis, 0.9, 1e-3, **settings)
    y, new = layer.apply(full, x, mask=mask, mutable=["batch_stats"])
    return y, new["batch_stats"]


@functools.cache
def made(kind, features, **settings):
    """An NNX layer's definition and state: made outside of jit, where it is cheap."""
    layer = kind(features, momentum=0.9, epsilon=1e-3, rngs=nnx.Rngs(0), **settings)
    return nnx.split(layer)


def in_nnx(kind, full, x, mask, train, axis, **settings):
    with jax.ensure_compile_time_eval():
        definition, state = made(kind, x.shape[axis], use_running_average=not train, axis=axis, **settings)
    layer = nnx.merge(definition, state, copy=True)
    for name, value in (full["params"] | full["batch_stats"]).items():
        getattr(layer, name).set_value(value)
    y = layer(x, mask=mask)
    return y, {name: getattr(layer, name)[...] for name in ("mean", "var")}


def stepped(run, kind, dtypes, x, stats=None, **more):
    """y and the new statistics for each of OPTIONS: of training, or of evaluation by the given statistics."""
    dtype, param_dtype = dtypes
    results = []
    for index, (use_scale, use_bias, axis, masked) in enumerate(OPTIONS):
        full = variables(use_scale, use_bias, axis, param_dtype, x)
        if stats is not None:
            full["batch_stats"] = stats[index]
        settings = {"use_scale": use_scale, "use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype}
        mask = jnp.asarray(MASK) if masked else None
        y, new = run(kind, full, x, mask, stats is None, axis, **settings, **more)
        used = jnp.asarray(MASK if masked and stats is None else np.ones_like(MASK))
        results.append((jnp.where(used, y, jnp.zeros_like(y)), new))
    return results


LAYERS = {
    "linen": (linen, nn.BatchNorm, jbn.linen.BatchNorm),
    "nnx": (in_nnx, nnx.BatchNorm, jbn.nnx.BatchNorm),
}
REAL = itertools.product(
    [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32],
    [None, jnp.float32, jnp.bfloat16],
    [jnp.float32, jnp.bfloat16],
)
COMPLEX = itertools.product([jnp.complex64], [None, jnp.complex64], [jnp.float32, jnp.complex64])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("x_dtype", "dtype", "param_dtype"), [*REAL, *COMPLEX])
def test_parity_with_flax(layer, x_dtype, dtype, param_dtype):
    run, theirs, ours = LAYERS[layer]
    x = jnp.asarray(X + 1j * X[::-1] if x_dtype == jnp.complex64 else X).astype(x_dtype)
    dtypes = (dtype, param_dtype)

    @jax.jit
    def everything(x):
        with loosely():
            their_steps = stepped(run, theirs, dtypes, x, use_fast_variance=False)
        our_steps = stepped(run, ours, dtypes, x)
        their_stats, our_stats = ([new for _, new in steps] for steps in (their_steps, our_steps))
        with loosely():
            by_theirs = stepped(run, theirs, dtypes, x, our_stats, use_fast_variance=False)
        return (our_steps, stepped(run, ours, dtypes, x, their_stats)), (their_steps, by_theirs)

    our_results, their_results = everything(x)
    for step in range(2):
        for option, (our_y, our_new), (y, new) in zip(
            OPTIONS, our_results[step], their_results[step], strict=True
        ):
            combination = dict(zip(NAMES, option, strict=True))
            assert our_y.dtype == y.dtype, combination
            assert_close(our_y, y, tolerance(y.dtype))
            assert_trees_close(our_new, new, tolerance(np.float32))
