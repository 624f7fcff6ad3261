"""However a batch is cut over devices: y, the new statistics and every gradient are those of one device."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

import jbn
import jbn.linen
from tests.support import reference
from tests.support.cases import assert_close, assert_trees_close, tolerance
from tests.support.compiling import optimized
from tests.support.ways import BY_NAME, ONE, WAYS, Result, training

N, T, C = 32, 2, 4
TOLERANCE = tolerance(np.float32)
POISON = np.where(np.arange(N * T * C).reshape(N, T, C) % 3 > 0, np.nan, np.inf).astype(np.float32)


def masks():
    rng = np.random.default_rng(3)
    return {
        "no mask": None,
        "unequal counts": rng.random(N) < 0.6,
        "last devices nothing": np.arange(N) < 5,
        "one example": np.arange(N) == 17,
        "nothing anywhere": np.zeros(N, bool),
        "weights": (rng.integers(0, 3, (N, T)) * rng.uniform(0.25, 1.0, (N, T))).astype(np.float32),
        "entries": rng.random((N, T, C)) < 0.5,
    }


def make(mask):
    """x drifts along the batch, so that devices differ; NaN and inf where the mask takes out."""
    rng = np.random.default_rng(0)
    drift = np.linspace(-2, 2, N)[:, None, None]
    x = (rng.standard_normal((N, T, C)) * 2 + drift + 0.5).astype(np.float32)
    x = x if mask is None else np.where(reference.full_weights(x, -1, mask) > 0, x, POISON)
    params = {name: rng.uniform(0.5, 1.5, C).astype(np.float32) for name in ("scale", "bias")}
    return params, x, mask, rng.standard_normal((N, T, C)).astype(np.float32)


def core(params, x, mask, axis_name):
    return jbn.batch_norm(
        params, jbn.init(C)[1], x, use_running_average=False, momentum=0.9, mask=mask, axis_name=axis_name
    )


def linen(params, x, mask, axis_name):
    layer = jbn.linen.BatchNorm(use_running_average=False, momentum=0.9, axis_name=axis_name)
    variables = {"params": params, "batch_stats": jbn.init(C)[1]}
    y, new = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, new["batch_stats"]


def without_statistics(params, x, mask, axis_name):
    return jbn.batch_norm(params, None, x, use_running_average=False, mask=mask, axis_name=axis_name)


@functools.cache
def compiled(way, apply):
    return way.jit(training(apply))


@functools.cache
def on_one_device(apply, name):
    return compiled(ONE, apply)(*make(masks()[name]))


def assert_same(way, apply, name):
    """As on one device, and bit for bit the same statistics on every device."""
    params, x, mask, cotangent = make(masks()[name])
    used = reference.full_weights(x, -1, mask) > 0
    actual, expected = compiled(way, apply)(params, x, mask, cotangent), on_one_device(apply, name)
    assert_close(actual.y, expected.y, TOLERANCE, where=used)
    assert_close(actual.dx, expected.dx, TOLERANCE)
    assert_trees_close(actual.d_params, expected.d_params, TOLERANCE)
    first = jax.tree.map(lambda stacked: stacked[:1], actual.batch_stats)
    repeated = jax.tree.map(lambda a: np.repeat(a, len(actual.batch_stats["mean"]), 0), first)
    chex.assert_trees_all_equal(actual.batch_stats, repeated, strict=True)
    assert_trees_close(first, expected.batch_stats, TOLERANCE)


@pytest.mark.parametrize("name", masks())
def test_one_device_is_the_closed_form(name):
    """What the others are compared with."""
    params, x, mask, cotangent = make(masks()[name])
    result, used = on_one_device(core, name), reference.full_weights(x, -1, mask) > 0
    _, mean, var = (part.reshape(-1) for part in reference.statistics(x, -1, mask))
    assert_close(
        result.y,
        reference.normalize(x, -1, params["scale"], params["bias"], 1e-5, mask),
        TOLERANCE,
        where=used,
    )
    expected = reference.gradients(x, -1, params["scale"], 1e-5, cotangent, mask)
    assert_close(result.dx, expected.x, TOLERANCE)
    assert_close(result.d_params["scale"], expected.scale, TOLERANCE)
    assert_close(result.d_params["bias"], expected.bias, TOLERANCE)
    several = used.sum((0, 1)) > 1
    assert_close(result.batch_stats["mean"][0], np.where(several, 0.1 * mean, 0), TOLERANCE)
    assert_close(result.batch_stats["var"][0], np.where(several, 0.9 + 0.1 * var, 1), TOLERANCE)


@pytest.mark.parametrize("name", [name for name in masks() if name != "entries"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_the_answer_of_one_device(way, name):
    assert_same(way, core, name)


def test_the_answer_of_one_device_without_an_index_of_devices(monkeypatch):
    """Before JAX 0.10.2 a shard_map within a shard_map cannot ask for it."""
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 1))
    way = dataclasses.replace(BY_NAME["shard_map in shard_map"], name="compiled for itself")
    assert_same(way, core, "weights")
    assert "= axis_index" not in str(compiled(way, core).trace(*make(masks()["weights"])).jaxpr)


@pytest.mark.quick
@pytest.mark.parametrize("way", ["shard_map", "jit, explicit axes, examples and features sharded"])
def test_the_answer_of_one_device_where_channels_have_their_own_masks(way):
    assert_same(BY_NAME[way], core, "entries")


FEW = [BY_NAME[name] for name in ("pmap", "shard_map", "shard_map, unchecked")]
FEW += [BY_NAME["jit, explicit axes, examples sharded"]]


@pytest.mark.parametrize("name", ["no mask", "last devices nothing"])
@pytest.mark.parametrize("way", FEW, ids=lambda way: way.name)
@pytest.mark.parametrize("apply", [linen, without_statistics])
def test_the_answer_of_one_device_from(apply, way, name):
    assert_same(way, apply, name)


@functools.cache
def forward(way, axis):
    def step(variables, x, mask, cotangent, axis_name):
        y, new = jbn.batch_norm(
            *variables, x, use_running_average=False, axis=axis, momentum=0.0, mask=mask, axis_name=axis_name
        )
        return Result(y, cotangent, {}, new)

    return dataclasses.replace(way, compile=optimized).jit(step)


def synchronised(way, x, mask=None, params=None, batch_stats=None, axis=-1):
    """y as one batch, and the statistics of the first device."""
    batch_stats = jbn.init(x.shape[axis])[1] if batch_stats is None else batch_stats
    result = forward(way, axis)((params, batch_stats), x, mask, x)
    return np.asarray(result.y), {name: np.asarray(value[0]) for name, value in result.batch_stats.items()}


MANY = [
    BY_NAME[name] for name in ("vmap over 8", "vmap over 16", "shard_map", "jit, auto axes, examples sharded")
]
MANY += [BY_NAME["jit, explicit axes, examples sharded"]]
many = pytest.mark.parametrize("way", MANY, ids=lambda way: way.name)


def normal(location):
    return (np.random.default_rng(0).standard_normal((4096, 1, 64)) + location).astype(np.float32)


@many
@pytest.mark.parametrize("location", [0.0, 1e4])
@pytest.mark.parametrize("converged", [False, True])
def test_accuracy_is_that_of_one_device(way, location, converged):
    """The bounds are those of one device, also at a first step far from zero."""
    x = normal(location)
    start = {"mean": np.full(64, location * converged, np.float32), "var": np.ones(64, np.float32)}
    y, new = synchronised(way, x, batch_stats=start)
    expected = reference.normalize(x, -1, None, None, 1e-5)
    var = reference.statistics(x, -1).var.reshape(-1)
    assert np.abs(new["var"] / var - 1).max() < 1e-6
    chex.assert_tree_all_finite(y)
    assert np.abs(y - expected).max() < 2e-6


@many
def test_a_constant_channel_is_exactly_bias(way):
    values = np.array([0.0, 3141.5927, 1e4 / 3, -0.1, 1e-20, 1e30, -1e30, 7.0], np.float32)
    params = {"scale": np.full(8, 1.7, np.float32), "bias": np.full(8, 0.3, np.float32)}
    x = np.broadcast_to(values, (48, 1, 8)).copy()
    for mask in (None, np.arange(48) % 5 > 0, np.arange(48) > 40):  # by the last, most devices have nothing
        y, new = synchronised(way, x, mask, params=params)
        np.testing.assert_array_equal(new["var"], np.zeros(8, np.float32))
        np.testing.assert_array_equal(new["mean"], values)
        np.testing.assert_array_equal(y, np.full_like(x, 0.3))


@many
def test_devices_far_apart_are_one_batch(way):
    """Each device's own variance is 1; that of the batch is the spread of their means."""
    x = normal(0.0)[:64] + np.repeat(1e3 * np.arange(4, dtype=np.float32), 16)[:, None, None]
    y, new = synchronised(way, x)
    assert_close(new["mean"], reference.statistics(x, -1).mean.reshape(-1), TOLERANCE)
    assert_close(new["var"], reference.statistics(x, -1).var.reshape(-1), TOLERANCE)
    assert_close(y, reference.normalize(x, -1, None, None, 1e-5), TOLERANCE)


@pytest.mark.parametrize("way", ["vmap over 16", "pmap", "shard_map", "jit, explicit axes, examples sharded"])
def test_one_value_on_each_device(way):
    way = BY_NAME[way]
    x = normal(0.5)[: way.devices, 0]
    y, new = synchronised(way, x)
    assert_close(new["var"], reference.statistics(x, -1).var.reshape(-1), TOLERANCE)
    assert_close(y, reference.normalize(x, -1, None, None, 1e-5), TOLERANCE)


@pytest.mark.parametrize("way", ["vmap over 8", "pmap", "shard_map", "jit, explicit axes, rows sharded"])
def test_channels_first_counts_the_same_rows(way):
    x = np.random.default_rng(0).standard_normal((16, 6, 6, 4)).astype(np.float32)
    first, stats_first = synchronised(BY_NAME[way], np.moveaxis(x, -1, 1).copy(), axis=1)
    last, stats_last = synchronised(ONE, x)
    assert_close(np.moveaxis(first, 1, -1), last, TOLERANCE)
    assert_trees_close(stats_first, stats_last, TOLERANCE)
