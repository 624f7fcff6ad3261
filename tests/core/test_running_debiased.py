"""Debiased evaluation: the initial 0 and 1 play no part in it."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.nnx
from tests.support.cases import assert_close, assert_trees_close, loosely
from tests.support.doors import every_door, linen
from tests.support.running import BATCH_STATS, PARAMS, PARTS, ROWS, TOLERANCE, trained


@every_door
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_debiased_evaluation_after_one_update_is_by_that_batch(door, momentum):
    settings = {"momentum": momentum, "debias": True}
    new = trained(door, PARTS[:1], **settings)
    y, same = door(PARAMS, new, ROWS, True, **settings)
    expected = (ROWS - PARTS[0].mean(0)) / np.sqrt(PARTS[0].var(0) + 1e-5)
    assert_close(y, expected, TOLERANCE / (1 - momentum) ** 0.5)  # var was rounded next to momentum * 1
    assert_trees_close(same, new, 0.0)


@every_door
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_debiased_evaluation_before_any_update_is_the_identity(door, momentum):
    y, _ = door(PARAMS, BATCH_STATS, ROWS, True, momentum=momentum, debias=True, epsilon=0.0)
    np.testing.assert_array_equal(y, ROWS)


def test_debiased_statistics_are_the_weighted_average_of_the_batches():
    new = trained(functools.partial(jbn.batch_norm, use_running_average=False), PARTS, momentum=0.9)
    weights = 0.9 ** np.arange(len(PARTS))[::-1]
    mean = np.average([x.mean(0) for x in PARTS], axis=0, weights=weights)
    var = np.average([x.var(0) for x in PARTS], axis=0, weights=weights)
    y, _ = jbn.batch_norm(None, new, ROWS, use_running_average=True, momentum=0.9, debias=True)
    assert_close(y, (ROWS - mean) / np.sqrt(var + 1e-5), TOLERANCE)


def test_haiku_debiases_alike():
    hk = pytest.importorskip("haiku")
    with loosely():
        net = hk.transform_with_state(lambda *args: hk.BatchNorm(True, True, 0.9, eps=1e-5)(*args))  # noqa: PLW0108 - a module is made inside
        params, state = net.init(jax.random.key(0), PARTS[0], True)
        new = BATCH_STATS
        for x in PARTS:
            _, state = net.apply(params, state, None, x, True)
            _, new = jbn.batch_norm(PARAMS, new, x, use_running_average=False, momentum=0.9)
            theirs, _ = net.apply(params, state, None, ROWS, False)
            ours, _ = jbn.batch_norm(PARAMS, new, ROWS, use_running_average=True, momentum=0.9, debias=True)
            assert_close(ours, theirs, 10 * TOLERANCE)  # both have rounded a variance next to the other part


def test_learned_statistics_without_a_count_are_not_debiased():
    stats = {name: BATCH_STATS[name] for name in ("mean", "var")}
    for settings in ({"debias": True}, {"momentum": None}):
        with pytest.raises(ValueError, match=r"Expected (count|rows) for"):
            linen(PARAMS, stats, PARTS[0], **settings)
        with pytest.raises(ValueError, match="counted their updates from the first one"):
            jbn.nnx.replace_batch_norm(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), **settings)
