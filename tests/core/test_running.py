"""How running statistics are updated: the rule, its edges, and what comes back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
import jbn.linen
from tests.support.cases import assert_close, assert_trees_close, tolerance


def rows(*values):
    return np.asarray(values, np.float32)[:, None]


def train(batch_stats, x, **settings):
    return jbn.batch_norm(None, batch_stats, x, use_running_average=False, **settings)[1]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
def test_momentum_weighs_the_old_value(momentum):
    old = {"mean": np.array([3.0], np.float32), "var": np.array([7.0], np.float32)}
    new = train(old, rows(1, 2, 3, 4), momentum=momentum)
    assert_close(new["mean"], [momentum * 3 + (1 - momentum) * 2.5], tolerance(np.float32))
    assert_close(new["var"], [momentum * 7 + (1 - momentum) * 1.25], tolerance(np.float32))


def test_momentum_may_be_traced():
    step = jax.jit(lambda m: train(jbn.init(1)[1], rows(1, 3), momentum=m))
    assert_close(step(jnp.float32(0.25))["mean"], [1.5], tolerance(np.float32))


def test_the_variance_of_zeros_decays_geometrically():
    batch_stats = jbn.init(1)[1]
    for _ in range(100):
        batch_stats = train(batch_stats, rows(0, 0, 0), momentum=0.9)
    np.testing.assert_allclose(batch_stats["var"], [2.656e-5], rtol=1e-3)


def test_the_stored_variance_is_biased():
    assert_close(train(jbn.init(1)[1], rows(0, 2), momentum=0.0)["var"], [1.0], tolerance(np.float32))


def test_five_equal_batches():
    batch_stats = jbn.init(1)[1]
    for _ in range(5):
        batch_stats = train(batch_stats, rows(1, 2, 3, 4), momentum=0.9)
    np.testing.assert_allclose(batch_stats["var"], [1.1024], rtol=1e-4)


def test_float32_statistics_follow_bfloat16_data():
    """In bfloat16 the running mean of 101 would stay at 100 for ever."""
    batch_stats = {"mean": np.array([100.0], np.float32), "var": np.ones(1, np.float32)}
    x = np.asarray([[100.0], [102.0]], jnp.bfloat16)
    step = jax.jit(lambda s: train(s, x, momentum=0.99))
    for _ in range(1000):
        batch_stats = step(batch_stats)
    np.testing.assert_allclose(batch_stats["mean"], [101.0], rtol=1e-4)


def test_count_and_rows_count_updates():
    batch_stats = jbn.init(2, count=True)[1]
    x = np.zeros((5, 2), np.float32)
    batch_stats = train(batch_stats, x)
    batch_stats = train(batch_stats, x, mask=np.arange(5) < 3)
    batch_stats = train(batch_stats, x, mask=np.zeros(5, bool))
    assert int(batch_stats["count"]) == 2
    assert batch_stats["count"].dtype == np.int32
    np.testing.assert_array_equal(batch_stats["rows"], np.array([8, 8], np.float32))


@pytest.mark.parametrize("x", [np.zeros((0, 2), np.float32), np.zeros((3, 0, 2), np.float32)])
def test_an_empty_batch_updates_nothing(x):
    old = {"mean": np.array([3.0, 4.0], np.float32), "var": np.array([7.0, 8.0], np.float32)}
    y, new = jbn.batch_norm(jbn.init(2)[0], old, x, use_running_average=False)
    assert y.shape == x.shape
    chex.assert_trees_all_equal(new, old, strict=True)
    params = jbn.init(2)[0]
    gradients = jax.grad(lambda p: jnp.sum(jbn.batch_norm(p, old, x, use_running_average=False)[0]))(params)
    chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, params), strict=True)


def test_a_channel_without_rows_keeps_its_statistics():
    mask = np.array([[True, False], [True, False], [True, False]])
    x = np.array([[1, 9], [2, 9], [3, 9]], np.float32)
    new = train(jbn.init(2)[1], x, mask=mask, momentum=0.0)
    assert_close(new["mean"], [2.0, 0.0], tolerance(np.float32))
    assert_close(new["var"], [2 / 3, 1.0], tolerance(np.float32))


def test_update_takes_one_row_and_keeps_what_has_none():
    """Unlike `batch_norm`, which leaves out a channel of one row: moments may be of single examples."""
    x, mask = np.array([[4, 9]], np.float32), np.array([[True, False]])
    new = jbn.update(jbn.init(2)[1], jbn.moments(x, mask=mask), momentum=0.5)
    assert_close(new["mean"], [2.0, 0.0], tolerance(np.float32))
    assert_close(new["var"], [0.5, 1.0], tolerance(np.float32))


def test_one_value_known_at_run_time_is_bias_and_updates_nothing():
    params = {"bias": np.array([0.5], np.float32)}
    x, mask = rows(4, np.nan, np.nan), np.array([True, False, False])
    y, new = jax.jit(
        lambda x, mask: jbn.batch_norm(params, jbn.init(1)[1], x, mask=mask, use_running_average=False)
    )(x, mask)
    assert float(y[0, 0]) == 0.5
    chex.assert_tree_all_finite(y)
    assert float(new["mean"][0]) == 0.0
    assert float(new["var"][0]) == 1.0


@pytest.mark.parametrize("momentum", [0, 0.0, 1e-40, 1e-50, np.float32(0)], ids=repr)
def test_nothing_of_the_old_is_in_the_new_where_its_share_is_0(momentum):
    lost = {name: np.array([np.nan, np.inf], np.float32) for name in ("mean", "var")}
    new = train(lost, np.array([[1, 2], [3, 6]], np.float32), momentum=momentum)
    assert_close(new["mean"], [2, 4], tolerance(np.float32))
    assert_close(new["var"], [1, 4], tolerance(np.float32))


def test_nothing_of_the_batch_is_in_the_new_where_its_share_is_0():
    for momentum in (1, 1.0, np.float32(1)):
        new = train(jbn.init(1)[1], rows(1, np.nan), momentum=momentum)
        assert [float(new["mean"][0]), float(new["var"][0])] == [0, 1]


def test_another_momentum_compiles_nothing(caplog):
    """Outside of jit, where a schedule may be made of numbers."""
    x, stats = rows(1, 2, 3), jbn.init(1)[1]
    step = jax.value_and_grad(
        lambda x, m: jnp.sum(jbn.batch_norm(None, stats, x, use_running_average=False, momentum=m)[0])
    )
    step(x, 0.9)
    with jax.log_compiles(True):
        step(x, 0.8)
    assert not caplog.records


def test_weights_that_sum_to_one_are_a_whole_batch():
    weights = np.full(4, 0.25, np.float32)
    new = train(jbn.init(1)[1], rows(1, 2, 3, 4), mask=weights, momentum=0.0)
    assert_close(new["mean"], [2.5], tolerance(np.float32))
    assert_close(new["var"], [1.25], tolerance(np.float32))


def test_update_after_moments_is_what_training_does():
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    batch_stats = jbn.init(3, count=True)[1]
    direct = train(batch_stats, x, momentum=0.9)
    in_two = jbn.update(batch_stats, jbn.moments(x), momentum=0.9)
    assert_trees_close(in_two, direct, tolerance(np.float32))


@pytest.mark.parametrize("mode", [True, False])
def test_what_comes_back_is_like_what_went_in(mode):
    """Structure, shapes, dtypes and weak types, so that it can be a scan carry and never recompiles."""
    stats = jbn.init(3, count=True)[1]
    stats["var"] = jnp.full((3,), 1.0)  # weakly typed
    stats["mean"] = stats["mean"].astype(jnp.bfloat16)
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    _, new = jbn.batch_norm(None, stats, x, use_running_average=mode)
    assert jax.tree.structure(new) == jax.tree.structure(stats)
    for name, value in stats.items():
        assert jax.typeof(new[name]) == jax.typeof(value)
        assert new[name].weak_type == value.weak_type


def test_no_statistics_kept():
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    for mode in (True, False):
        y, new = jbn.batch_norm(None, None, x, use_running_average=mode)
        assert new is None
        assert_close(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), tolerance(np.float32))


@pytest.mark.parametrize(("dtype", "padding"), [(np.float16, 300), (jnp.bfloat16, 3e38), (np.float32, 1e38)])
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("valid", [0, 1, 4])
def test_padding_of_any_size_leaves_y_finite(dtype, padding, mode, valid):
    """A masked loss multiplies y by 0, and 0 times infinity is NaN."""
    x = np.full((6, 3), padding).astype(dtype)
    x[:valid] = np.arange(3 * valid).reshape(valid, 3).astype(dtype)
    mask = np.arange(6) < valid
    y, _ = jbn.batch_norm(None, jbn.init(3)[1], x, use_running_average=mode, mask=mask)
    assert np.isfinite(np.asarray(y, np.float64)).all()


def test_a_traced_mode_leaves_moments_in_both_modes():
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    layer = jbn.linen.BatchNorm()
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    apply = jax.jit(lambda flag: layer.apply(variables, x, flag, mutable=["batch_stats", "batch_moments"])[1])
    for evaluating in (True, False):
        assert float(apply(evaluating)["batch_moments"]["moments"].count[0]) == 8
