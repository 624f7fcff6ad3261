"""Evaluation by running and batch statistics together, arXiv 2006.16971: `blend`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
import jbn.linen
from tests.support import reference
from tests.support.cases import REAL, assert_close, assert_trees_close, by_name, tolerance
from tests.support.doors import every_door

TOLERANCE = tolerance(np.float32)
X = (np.random.default_rng(0).standard_normal((16, 3)) * [1, 2, 0.5] + [3, -1, 0]).astype(np.float32)
COTANGENT = np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)
PARAMS = {"scale": np.array([0.5, 1, 2], np.float32), "bias": np.array([0, 1, -1], np.float32)}
STATS = {"mean": np.array([0.5, 0, 1], np.float32), "var": np.array([1, 2, 0.5], np.float32)}


def evaluate(params, stats, x, **settings):
    return jbn.batch_norm(params, stats, x, use_running_average=True, **settings)


@pytest.mark.parametrize(**by_name(REAL))
def test_the_formula(case):
    """Mean and variance are `blend * running + (1 - blend) * batch`, in float64; nothing is stored."""
    x, params, stats = case.make_x(), case.make_params(), case.make_batch_stats()
    y, new = jax.jit(functools.partial(evaluate, blend=0.7, **case.settings))(params, stats, x)
    axes = reference.reduced_axes(x, case.axis)
    batch = reference.statistics(x, case.axis, case.make_mask())
    mean, var = (
        0.7 * np.expand_dims(reference.exact(stats[name]), axes) + 0.3 * getattr(batch, name)
        for name in ("mean", "var")
    )
    scale, bias = params.get("scale"), params.get("bias")
    expected = reference.apply(x, case.axis, mean, var, scale, bias, case.epsilon, case.make_mask())
    assert_close(y, expected, tolerance(case.dtype), where=case.weights() > 0)
    assert_trees_close(new, stats, 0.0)


@every_door
@pytest.mark.parametrize("blend", [0.0, 0.25, jnp.float32(0.25), 1, 1.0])
def test_every_door_and_kind_of_number(door, blend):
    y, new = door(PARAMS, STATS, X, True, blend=blend)
    mixed = jbn.update(STATS, jbn.moments(X), momentum=blend)
    assert_close(y, evaluate(PARAMS, mixed, X)[0], TOLERANCE)
    assert_trees_close(new, STATS, 0.0)


@every_door
def test_one_value_per_channel_is_bias_where_the_batch_alone_counts(door):
    """As the cookbook warns: the value is its own mean. With a share of the running statistics it is not."""
    np.testing.assert_array_equal(door(PARAMS, STATS, X[:1], True, blend=0.0)[0], PARAMS["bias"][None])
    assert np.abs(door(PARAMS, STATS, X[:1], True, blend=0.9)[0] - PARAMS["bias"][None]).min() > 0.1


@every_door
def test_training_knows_nothing_of_it(door):
    assert_trees_close(door(PARAMS, STATS, X, blend=0.5), door(PARAMS, STATS, X), 0.0)


def test_without_statistics_of_the_batch_far_from_zero_loses_no_digits():
    x = (np.random.default_rng(0).standard_normal((512, 4)) + 1e4).astype(np.float32)
    stats = {"mean": np.full(4, 1e4, np.float32), "var": np.ones(4, np.float32)}
    y, _ = evaluate(None, stats, x, blend=0.5)
    mean, var = 0.5e4 + 0.5 * x.mean(0, dtype=np.float64), 0.5 + 0.5 * x.var(0, dtype=np.float64)
    assert np.abs(y - (x - mean) / np.sqrt(var + 1e-5)).max() < 2e-6


@pytest.mark.parametrize("blend", [0.3, 0.0])
def test_gradients_flow_through_the_part_of_the_batch(blend):
    def ours(params, x):
        return evaluate(params, STATS, x, blend=blend)[0]

    def by_hand(params, x):
        mean, var = jnp.mean(x, 0), jnp.var(x, 0)
        mean, var = (blend * STATS[n] + (1 - blend) * b for n, b in (("mean", mean), ("var", var)))
        return params["scale"][None] * (x - mean[None]) / jnp.sqrt(var[None] + 1e-5) + params["bias"][None]

    found, expected = (
        jax.jit(lambda params, x, f=f: (f(params, x), jax.vjp(f, params, x)[1](COTANGENT)))(PARAMS, X)
        for f in (ours, by_hand)
    )
    assert_trees_close(found, expected, TOLERANCE)


@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
def test_the_share_has_a_derivative_at_its_ends_too(blend):
    """As where it is learned: y moves with the mean and the variance."""

    def loss(blend):
        return jnp.sum(COTANGENT * evaluate(PARAMS, STATS, X, blend=blend)[0])

    def by_hand(blend):
        mean, var = (
            blend * STATS[name] + (1 - blend) * batch
            for name, batch in (("mean", X.mean(0)), ("var", X.var(0)))
        )
        x_hat = (X - mean[None]) / jnp.sqrt(var[None] + 1e-5)
        return jnp.sum(COTANGENT * (PARAMS["scale"][None] * x_hat + PARAMS["bias"][None]))

    found, expected = (jax.jit(jax.grad(f))(blend) for f in (loss, by_hand))
    assert_close(found, expected, 10 * TOLERANCE)


@pytest.mark.parametrize("kind", [jnp.bfloat16, np.float64])
def test_statistics_of_other_dtypes(kind, x64):
    stats = jax.tree.map(lambda a: a.astype(kind), STATS)
    y, new = evaluate(PARAMS, stats, X, blend=0.5)
    exact = {name: value.astype(np.float32) for name, value in stats.items()}
    assert_close(y, evaluate(PARAMS, exact, X, blend=0.5)[0], TOLERANCE)
    assert new["mean"].dtype == kind


@pytest.mark.parametrize("devices", [2, 16])
def test_devices_and_masks_as_in_training(devices):
    x = (
        np.random.default_rng(2).standard_normal((devices, 4, 3)) + np.arange(devices)[:, None, None]
    ).astype(np.float32)
    mask = np.random.default_rng(3).random((devices, 4)) < 0.6
    run = jax.vmap(
        lambda x, mask: evaluate(PARAMS, STATS, x, blend=0.4, mask=mask, axis_name="data")[0],
        axis_name="data",
    )
    whole, _ = evaluate(PARAMS, STATS, x.reshape(-1, 3), blend=0.4, mask=mask.reshape(-1))
    assert_close(jax.jit(run)(x, mask), whole.reshape(x.shape), TOLERANCE, where=mask[..., None])


def test_a_channel_without_rows_has_the_running_statistics():
    y, _ = evaluate(PARAMS, STATS, X, blend=0.2, mask=np.zeros(16, bool))
    assert_close(y, evaluate(PARAMS, STATS, X)[0], TOLERANCE)


def test_debiased_statistics_are_those_that_are_blended():
    stats = jbn.init(3, count=True)[1]
    _, stats = jbn.batch_norm(PARAMS, stats, X, use_running_average=False, momentum=0.9)
    y, _ = evaluate(PARAMS, stats, X[:4], blend=0.5, debias=True, momentum=0.9)
    learned = {"mean": X.mean(0), "var": X.var(0)}
    assert_close(y, evaluate(PARAMS, learned, X[:4], blend=0.5)[0], 10 * TOLERANCE)


def test_a_traced_mode_and_a_traced_share():
    @jax.jit
    def run(flag, blend):
        return jbn.batch_norm(PARAMS, STATS, X, use_running_average=flag, blend=blend)

    for flag in (True, False):
        expected = jbn.batch_norm(PARAMS, STATS, X, use_running_average=flag, blend=0.3)
        assert_trees_close(run(flag, 0.3), expected, TOLERANCE)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = jbn.linen.BatchNorm(True, blend=0.5)(jnp.tanh(x))
        return x


def test_each_layer_is_fed_by_the_adapted_one_before():
    """Updating all statistics first, and evaluating then, would be another thing."""
    net = Net()
    variables = net.init(jax.random.key(0), X)
    x = X
    for stats in variables["batch_stats"].values():
        mixed = jbn.update(stats, jbn.moments(np.tanh(x)), momentum=0.5)
        x, _ = evaluate(None, mixed, np.tanh(x))
    assert_close(net.apply(variables, X), x, TOLERANCE)


def test_an_evaluation_that_does_not_blend_reduces_nothing():
    for settings, reduces in (({}, False), ({"blend": 1.0}, False), ({"blend": 0.5}, True)):
        text = jax.jit(functools.partial(evaluate, PARAMS, STATS, **settings)).lower(X).as_text()
        assert ("stablehlo.reduce" in text) == reduces
