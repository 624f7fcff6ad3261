"""What the linen layer offers on top of Flax's, and what it says when it is used wrongly."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import jbn
import jbn.linen
from tests.support.cases import assert_close, assert_trees_close, tolerance

X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
COTANGENT = np.random.default_rng(1).standard_normal((8, 3)).astype(np.float32)
NORMAL = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5)


def start(**settings):
    layer = jbn.linen.BatchNorm(**settings)
    return layer, layer.init(jax.random.key(0), X, **({} if settings else {"use_running_average": True}))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, **options):
        shared = jbn.linen.BatchNorm(name="bn")
        return shared(x[:5], **options), shared(x[5:], **options)


def test_initial_statistics():
    keyed = jax.nn.initializers.normal()
    _, variables = start(
        use_running_average=True, mean_init=keyed, var_init=nn.initializers.constant(2), scale_init=keyed
    )
    assert float(jnp.abs(variables["batch_stats"]["mean"]).min()) > 0
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.full(3, 2, np.float32))
    with jax.numpy_dtype_promotion("standard"):
        flax = nn.BatchNorm(use_running_average=True, scale_init=keyed).init(jax.random.key(0), X)
    np.testing.assert_array_equal(variables["params"]["scale"], flax["params"]["scale"])


def test_update_batch_stats_false_uses_the_batch_and_writes_nothing():
    layer, variables = start(use_running_average=False)
    y = layer.apply(variables, X, update_batch_stats=False)
    assert_close(y, NORMAL, tolerance(np.float32))
    _, new = layer.apply(variables, X, update_batch_stats=False, mutable=["batch_stats"])
    assert_trees_close(new["batch_stats"], variables["batch_stats"], 0.0)


@pytest.mark.parametrize("mode", [True, False, None])
def test_frozen_is_a_constant(mode):
    """Running statistics, bit-equal variables after training, dx = g scale rsqrt(var + eps), no other."""
    layer = jbn.linen.BatchNorm(frozen=True, use_running_average=mode)
    variables = {
        "params": {"scale": np.array([1, 2, 3], np.float32), "bias": np.ones(3, np.float32)},
        "batch_stats": {"mean": np.ones(3, np.float32), "var": np.array([1, 4, 9], np.float32)},
    }

    @jax.jit
    def step(variables, x):
        y, pullback, new = jax.vjp(
            lambda params, x: layer.apply(variables | {"params": params}, x, mutable=["batch_stats"]),
            variables["params"],
            x,
            has_aux=True,
        )
        return y, pullback(jnp.asarray(COTANGENT)), new["batch_stats"]

    for _ in range(3):
        y, (d_params, dx), new = step(variables, X)
        assert_trees_close(new, variables["batch_stats"], 0.0)
    factor = np.array([1, 2, 3]) / np.sqrt(np.array([1, 4, 9]) + 1e-5)
    assert_close(y, (X - 1) * factor + 1, tolerance(np.float32))
    assert_close(dx, COTANGENT * factor, tolerance(np.float32))
    chex.assert_trees_all_equal(d_params, jax.tree.map(jnp.zeros_like, variables["params"]), strict=True)


def test_batch_moments_are_left_where_they_are_asked_for():
    layer, variables = start(use_running_average=False)
    _, new = layer.apply(variables, X, mutable=["batch_stats", "batch_moments"])
    assert_trees_close(new["batch_moments"]["moments"], jbn.moments(X), tolerance(np.float32))
    _, new = layer.apply(variables, X, mutable=["batch_stats"])
    assert "batch_moments" not in new
    _, new = layer.apply(
        variables, X, use_running_average=None, update_batch_stats=False, mutable=["batch_moments"]
    )
    assert_trees_close(new["batch_moments"]["moments"], jbn.moments(X), tolerance(np.float32))


def test_batch_moments_of_a_shared_layer_and_of_micro_batches_are_pooled():
    net = Net()
    variables = net.init(jax.random.key(0), X, use_running_average=True)
    _, new = net.apply(variables, X, use_running_average=False, mutable=["batch_stats", "batch_moments"])
    assert_trees_close(new["batch_moments"]["bn"]["moments"], jbn.moments(X), tolerance(np.float32))
    layer, variables = start(use_running_average=False)
    for rows in (X[:2], X[2:]):
        _, new = layer.apply(variables, rows, mutable=["batch_stats", "batch_moments"])
        variables = variables | {"batch_moments": new["batch_moments"]}
    assert_trees_close(new["batch_moments"]["moments"], jbn.moments(X), tolerance(np.float32))


@pytest.mark.parametrize("mutable", [True, nn.DenyList("params")], ids=["everything", "all but params"])
def test_batch_moments_must_be_asked_for_by_name(mutable):
    """So that what comes back is what Flax's layer gives: a scan carry, say."""
    layer, variables = start(use_running_average=False)
    _, new = layer.apply(variables, X, mutable=mutable)
    assert "batch_moments" not in new


def test_moments_can_be_serialized():
    moments = {"bn": jbn.moments(X)}
    restored = serialization.from_bytes(
        jax.tree.map(jnp.zeros_like, moments), serialization.to_bytes(moments)
    )
    assert_trees_close(restored, moments, 0.0)


def test_init_keeps_no_moments():
    variables = jbn.linen.BatchNorm(use_running_average=False).init(jax.random.key(0), X)
    assert set(variables) == {"params", "batch_stats"}


class Lifted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(jbn.linen.BatchNorm)(use_running_average=False, momentum=0.0, name="bn")(x)


def test_under_nn_jit():
    variables = Lifted().init(jax.random.key(0), X)
    y, new = Lifted().apply(variables, X, mutable=["batch_stats"])
    assert_close(y, NORMAL, tolerance(np.float32))
    assert_close(new["batch_stats"]["bn"]["mean"], X.mean(0), tolerance(np.float32))
