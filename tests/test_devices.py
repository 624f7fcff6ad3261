"""However a batch is cut over devices: y, the new statistics and every gradient are those of one device."""

import functools

import jax
import numpy as np
import pytest

import jbn
import jbn.linen
from tests import reference
from tests.cases import assert_close, assert_trees_close, tolerance
from tests.ways import ONE, WAYS, training

N, T, C = 32, 2, 4
TOLERANCE = tolerance(np.float32)
POISON = np.where(np.arange(N * T * C).reshape(N, T, C) % 3 > 0, np.nan, np.inf).astype(np.float32)


def masks():
    rng = np.random.default_rng(3)
    return {
        "no mask": None,
        "unequal counts": rng.random(N) < 0.6,
        "last devices nothing": np.arange(N) < 5,
        "one value on one device": np.arange(N * T).reshape(N, T) == 17,
        "nothing anywhere": np.zeros(N, bool),
        "entries": rng.random((N, T, C)) < 0.5,
        "weights": (rng.integers(0, 3, N) * rng.uniform(0.25, 1.0, N)).astype(np.float32),
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
    for stacked in jax.tree.leaves(actual.batch_stats):
        np.testing.assert_array_equal(stacked, np.broadcast_to(stacked[:1], stacked.shape))
    first = jax.tree.map(lambda stacked: stacked[:1], actual.batch_stats)
    assert_trees_close(first, expected.batch_stats, TOLERANCE)


@pytest.mark.parametrize("name", masks())
def test_one_device_is_the_closed_form(name):
    """What the others are compared with."""
    params, x, mask, cotangent = make(masks()[name])
    result, used = on_one_device(core, name), reference.full_weights(x, -1, mask) > 0
    count, mean, var = (part.reshape(-1) for part in reference.statistics(x, -1, mask))
    assert_close(
        result.y, reference.normalize(x, -1, params["scale"], params["bias"], 1e-5, mask), TOLERANCE, where=used
    )
    expected = reference.gradients(x, -1, params["scale"], 1e-5, cotangent, mask)
    assert_close(result.dx, expected.x, TOLERANCE)
    assert_close(result.d_params["scale"], expected.scale, TOLERANCE)
    assert_close(result.d_params["bias"], expected.bias, TOLERANCE)
    several = used.sum((0, 1)) > 1
    assert_close(result.batch_stats["mean"][0], np.where(several, 0.1 * mean, 0), TOLERANCE)
    assert_close(result.batch_stats["var"][0], np.where(several, 0.9 + 0.1 * var, 1), TOLERANCE)


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_the_answer_of_one_device(way, name):
    assert_same(way, core, name)


FEW = [way for way in WAYS if way.name in {"vmap over 8", "pmap", "shard_map", "shard_map, unchecked"}]
FEW += [way for way in WAYS if way.kind == "explicit"][:1]


@pytest.mark.parametrize("name", ["no mask", "last devices nothing"])
@pytest.mark.parametrize("way", FEW, ids=lambda way: way.name)
@pytest.mark.parametrize("apply", [linen, without_statistics])
def test_the_answer_of_one_device_from(apply, way, name):
    assert_same(way, apply, name)
