"""Averages of models over replicas and over time, and which of their parameters belong to batch norms."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
import jbn.nnx
import jbn.tools
from tests.support.cases import assert_close, assert_trees_close, tolerance

TOLERANCE = tolerance(np.float32)
X = (np.random.default_rng(0).standard_normal((4, 16, 3)) * 2 + 5).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="scale_free")(nn.Dense(4, name="dense")(x))
        return jbn.linen.BatchNorm(use_running_average=True, name="normal")(x)


def linen():
    return Net().init(jax.random.key(0), X[0])


def nnx_net():
    return nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
        nnx.LayerNorm(4, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
    )


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_replicas_of_equal_size_become_the_whole_batch(axis):
    stats = {"mean": X.mean(1), "var": X.var(1)}
    tree = {"a": {"bn": {name: np.moveaxis(value, 0, axis % 2) for name, value in stats.items()}}}
    merged = jbn.tools.merge_replicas(tree, axis)["a"]["bn"]
    assert_close(merged["mean"], X.reshape(-1, 3).mean(0), TOLERANCE)
    assert_close(merged["var"], X.reshape(-1, 3).var(0), TOLERANCE)


def test_replicas_that_pmap_left():
    params, stats = jbn.init(3, count=True)
    step = lambda x: jbn.batch_norm(params, stats, x, use_running_average=False, momentum=0.0)[1]  # noqa: E731
    merged = jbn.tools.merge_replicas(jax.pmap(step)(X))
    assert_close(merged["var"], X.reshape(-1, 3).var(0), TOLERANCE)
    assert int(merged["count"]) == 1
    np.testing.assert_array_equal(merged["rows"], np.full(3, 64, np.float32))


def test_replicas_far_from_zero():
    means = (1e4 + np.arange(8)[:, None] / 8).astype(np.float32)
    merged = jbn.tools.merge_replicas({"mean": means, "var": np.full_like(means, 0.5)})
    assert_close(merged["mean"] - np.float32(1e4), np.full(1, 7 / 16, np.float32), 1e-3)
    assert_close(merged["var"], 0.5 + np.float64(means).var(0), TOLERANCE)


def test_replicas_that_are_sharded_over_an_explicit_axis():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    stats = {"mean": np.tile(X.mean(1), (2, 1)), "var": np.tile(X.var(1), (2, 1))}
    with jax.set_mesh(mesh):
        merged = jax.jit(jbn.tools.merge_replicas)(jax.device_put(stats, NamedSharding(mesh, P("data"))))
    assert_close(merged["mean"], X.reshape(-1, 3).mean(0), TOLERANCE)
    assert_close(merged["var"], X.reshape(-1, 3).var(0), TOLERANCE)


def test_complex_replicas():
    x = X[..., ::-1] + np.complex64(1j) * X
    merged = jbn.tools.merge_replicas({"mean": x.mean(1), "var": x.var(1)})
    assert_close(merged["mean"], x.reshape(-1, 3).mean(0), TOLERANCE)
    assert_close(merged["var"], x.reshape(-1, 3).var(0), TOLERANCE)


@pytest.mark.parametrize("kept", [False, True])
def test_replicas_of_an_nnx_model(kept):
    """Whole, or its statistics; the kind stays, and what is not statistics is left alone."""
    model = nnx.Sequential(jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    if kept:
        jbn.nnx.keep_batch_moments(model)
    norm = model.layers[0]
    norm.mean.set_value(jnp.asarray(X.mean(1)))
    norm.var.set_value(jnp.asarray(X.var(1)))
    merged = jbn.tools.merge_replicas(model)
    assert type(merged) is nnx.Sequential
    assert_close(merged.layers[0].var[...], X.reshape(-1, 3).var(0), TOLERANCE)
    np.testing.assert_array_equal(merged.layers[0].scale[...], np.ones(3, np.float32))
    assert norm.var[...].shape == (4, 3)
    jbn.nnx.keep_batch_moments(model, keep=False)
    state = nnx.state(model, nnx.BatchStat)
    found = jbn.tools.merge_replicas(state)
    assert isinstance(found, nnx.State)
    assert_close(found["layers"][0]["var"][...], X.reshape(-1, 3).var(0), TOLERANCE)
    assert state["layers"][0]["var"][...].shape == (4, 3)


def test_ema_shares_no_array_with_the_new_model():
    """Whose buffers the next step may be given."""
    new = {"count": jnp.int32(3), "key": jax.random.key(0), "mean": jnp.ones(2)}
    averaged = jbn.tools.ema(new, new, 0.5)
    jax.tree.map(lambda leaf: leaf.delete(), {name: new[name] for name in ("count", "mean")})
    assert int(averaged["count"]) == 3
    assert jax.random.key_data(averaged["key"]).shape == (2,)


def test_masks_of_trees_with_little_in_them():
    stats = {"bn": jbn.init(3)[1]}
    for mask in (jbn.tools.weight_decay_mask, jbn.tools.freeze):
        assert mask({"batch_stats": stats}) == {}
        assert mask({"batch_stats": stats, "params": {"a": {}}}) == {"a": {}}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_merged_replicas_keep_their_dtype(dtype):
    merged = jbn.tools.merge_replicas({"mean": X.mean(1).astype(dtype), "var": X.var(1).astype(dtype)})
    assert merged["mean"].dtype == merged["var"].dtype == dtype
    assert_close(merged["var"], X.reshape(-1, 3).var(0), tolerance(dtype))


def test_ema_averages_statistics_with_parameters():
    old, new = linen(), jax.tree.map(lambda leaf: leaf + 1, linen())
    averaged = jbn.tools.ema(old, new, 0.75)
    assert_trees_close(averaged, jax.tree.map(lambda leaf: leaf + 0.25, old), TOLERANCE)


def test_ema_of_nnx_models_leaves_counters_alone():
    class Counting(nnx.Module):
        def __init__(self):
            self.norm = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            self.steps = nnx.Variable(jnp.int32(0))

    average, new = Counting(), Counting()
    new.norm(X[0])
    new.steps[...] += 5
    averaged = jbn.tools.ema(average, new, 0.75)
    assert_close(averaged.norm.mean[...], 0.25 * new.norm.mean[...], TOLERANCE)
    assert int(averaged.steps[...]) == 5
    assert int(average.steps[...]) == 0


def test_bfloat16_averages_are_rounded_once_and_keep_their_dtype():
    old, new = X[:2].astype(jnp.bfloat16)
    averaged = jbn.tools.ema({"a": old}, {"a": new}, 0.75)["a"]
    assert averaged.dtype == jnp.bfloat16
    exact = 0.75 * old.astype(np.float32) + 0.25 * new.astype(np.float32)  # float32 holds it
    np.testing.assert_array_equal(averaged, exact.astype(jnp.bfloat16))


def test_ema_takes_random_keys_from_the_new_model():
    old, new = ({"key": jax.random.key(seed), "a": jnp.full(2, float(seed))} for seed in (0, 4))
    averaged = jbn.tools.ema(old, new, 0.75)
    assert averaged["key"] == new["key"]
    np.testing.assert_array_equal(averaged["a"], np.ones(2, np.float32))


def test_batch_norms_are_found_by_their_statistics():
    mask = jbn.tools.weight_decay_mask(linen())
    assert mask == {
        "dense": {"kernel": True, "bias": True},
        "scale_free": {"scale": True, "bias": True},
        "normal": {"scale": False, "bias": False},
    }
    frozen = jbn.tools.weight_decay_mask(freeze(linen()))
    assert isinstance(frozen, FrozenDict)
    assert frozen.unfreeze() == mask
    assert nnx.to_pure_dict(jbn.tools.weight_decay_mask(nnx_net())) == {
        "layers": {0: mask["dense"], 1: mask["scale_free"], 2: mask["normal"]}
    }


def test_optax_decays_all_but_batch_norms():
    params = linen()["params"]
    optimizer = optax.chain(
        optax.add_decayed_weights(0.5, jbn.tools.weight_decay_mask(linen())), optax.sgd(1.0)
    )
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    expected = {name: jax.tree.map(lambda leaf: -0.5 * leaf, tree) for name, tree in params.items()}
    expected["normal"] = jax.tree.map(jnp.zeros_like, params["normal"])
    assert_trees_close(updates, expected, TOLERANCE)


def test_optax_holds_frozen_parameters_still():
    params = linen()["params"]
    parts = {"trainable": optax.sgd(1.0), "frozen": optax.set_to_zero()}
    optimizer = optax.multi_transform(parts, jbn.tools.freeze(linen()))
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    moved = {"dense": -1.0, "scale_free": -1.0, "normal": 0.0}
    expected = {
        name: jax.tree.map(functools.partial(np.full_like, fill_value=value), params[name])
        for name, value in moved.items()
    }
    chex.assert_trees_all_equal(updates, expected, strict=True)


def test_optax_freezes_batch_norms_of_an_nnx_model():
    model = nnx_net()
    parts = {"trainable": optax.sgd(1.0), "frozen": optax.set_to_zero()}
    optimizer = nnx.Optimizer(model, optax.multi_transform(parts, jbn.tools.freeze(model)), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    for layer, scale, bias in ((2, 1, 0), (1, 0, -1)):
        np.testing.assert_array_equal(model.layers[layer].scale[...], np.full(4, scale, np.float32))
        np.testing.assert_array_equal(model.layers[layer].bias[...], np.full(4, bias, np.float32))
