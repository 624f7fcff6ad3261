"""Batches of few rows, of none, masked or cut unequally: what people met elsewhere, by behaviour."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests.support import doors
from tests.support.cases import assert_close, assert_trees_close
from tests.support.doors import every_door
from tests.support.small_batch import BATCH_STATS, TOLERANCE, both


def rows(*values):
    return np.asarray(values, np.float32).reshape(len(values), -1)


def assert_stats(batch_stats, mean, var):
    assert_close(batch_stats["mean"], np.asarray(mean), TOLERANCE)
    assert_close(batch_stats["var"], np.asarray(var), TOLERANCE)


@both
def test_masked_rows_are_not_counted(door):
    x, mask = rows([1, 5], [2, 5], [9, 9]), np.array([True, True, False])
    y, new = door(jbn.init(2)[1], x, mask=mask, momentum=0.0)
    assert_stats(new, [1.5, 5], [0.25, 0])
    assert_close(y[:2], np.array([[-1, 0], [1, 0]]) * 0.5 / np.sqrt(0.25 + 1e-5), TOLERANCE)


@both
def test_padding_does_not_shift_the_statistics(door):
    x = rows(4, 6, 5, 0, 0, 0, 0, 0)
    assert_stats(door(jbn.init(1)[1], x, mask=np.arange(8) < 3, momentum=0.0)[1], [5], [2 / 3])


@both
def test_weights_below_0_take_no_part(door):
    """In JAX arrays, which are not asked for their values; the error for NumPy is among the texts."""
    x, wrong, right = rows(1, 2, 4, np.nan), jnp.array([1, 3, -2, jnp.nan]), jnp.array([1.0, 3, 0, 0])
    for compiled in (lambda run: run, jax.jit):
        run = compiled(lambda mask: door(jbn.init(1)[1], x, mask=mask, momentum=0.0))
        (y, new), expected = run(wrong), run(right)
        chex.assert_tree_all_finite(new)
        chex.assert_trees_all_equal((y[:3], new), (expected[0][:3], expected[1]))


@both
def test_a_batch_that_is_masked_out_changes_nothing_and_has_no_gradient(door):
    start, params = {"mean": rows(3)[0], "var": rows(7)[0]}, jbn.init(1)[0]

    def step(params, x):
        return door(start, x, params=params, mask=np.zeros(4, bool))

    y, pullback, new = jax.vjp(step, params, rows(1, 2, 3, 4), has_aux=True)
    chex.assert_tree_all_finite(y)
    assert_trees_close(new, start, 0.0)
    gradients = pullback(jnp.asarray(rows(1, -2, 3, 5)))
    chex.assert_trees_all_equal(gradients, jax.tree.map(np.zeros_like, (params, y)), strict=True)


@every_door
@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 1, 3)])
def test_one_value_per_channel_in_training(door, shape):
    """An error that says what to do; in a layer a warning, y is bias, and nothing is updated."""
    says = r"one value per channel.*larger batch.*use_running_average.*axis_name"
    bias = np.float32([1, 2, 3])
    if door is doors.core:
        with pytest.raises(ValueError, match=says):
            door({"bias": bias}, BATCH_STATS, np.zeros(shape, np.float32))
    else:
        with pytest.warns(UserWarning, match=says):
            y, new = door({"bias": bias}, BATCH_STATS, np.full(shape, 5, np.float32))
        np.testing.assert_array_equal(y, np.broadcast_to(bias, shape))
        chex.assert_trees_all_equal(new, BATCH_STATS)
    y, _ = door({}, BATCH_STATS, np.ones(shape, np.float32), True)
    assert_close(y, np.ones(shape) / np.sqrt(1 + 1e-5), TOLERANCE)


@pytest.mark.parametrize("door", [doors.linen, doors.of_nnx])
@pytest.mark.parametrize("size", [1, 32])
def test_one_example_in_a_layer_of_ghost_batches(door, size):
    """A look at a model: the example is a group. One value per channel gets the usual warning."""
    run = functools.partial(door, {"bias": np.float32([1, 2, 3])}, BATCH_STATS)
    image = np.random.default_rng(0).standard_normal((1, 4, 4, 3)).astype(np.float32)
    chex.assert_trees_all_equal(run(image, virtual_batch_size=size), run(image))
    with pytest.warns(UserWarning, match="one value per channel in training.*nothing is updated"):
        y, new = run(np.full((1, 3), 5, np.float32), virtual_batch_size=size)
    np.testing.assert_array_equal(y, np.float32([[1, 2, 3]]))
    chex.assert_trees_all_equal(new, BATCH_STATS)
    with pytest.raises(ValueError, match="a divisor of the 1 examples"):
        jax.vmap(
            lambda x: run(x, virtual_batch_size=2, axis_name="data"), axis_name="data", out_axes=(0, None)
        )(np.zeros((2, 1, 3), np.float32))


@both
def test_a_batch_of_no_rows_changes_nothing(door):
    y, new = door(BATCH_STATS, np.zeros((0, 3), np.float32))
    assert y.shape == (0, 3)
    assert_trees_close(new, BATCH_STATS, 0.0)


@both
def test_unequal_devices_weigh_by_count(door):
    """[1, 2, 3, 4] and one 10: mean 4 and variance 10, on both."""
    x, mask = rows(1, 2, 3, 4, 10, 0, 0, 0).reshape(2, 4, 1), np.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
    run = functools.partial(door, jbn.init(1)[1], axis_name="data", momentum=0.0)
    _, new = jax.vmap(lambda x, mask: run(x, mask=mask), axis_name="data")(x, mask)
    assert_stats(new, [[4], [4]], [[10], [10]])


@both
def test_a_device_without_rows_harms_nobody(door):
    x, mask = rows(1, 2, 3, 4, *[np.nan] * 4).reshape(2, 4, 1), np.array([[True] * 4, [False] * 4])
    run = functools.partial(door, jbn.init(1)[1], axis_name="data", momentum=0.0)
    y, new = jax.vmap(lambda x, mask: run(x, mask=mask), axis_name="data")(x, mask)
    assert_stats(new, [[2.5], [2.5]], [[1.25], [1.25]])
    chex.assert_tree_all_finite(y)


@both
def test_two_batches_are_not_their_concatenation(door):
    first, second = rows(0, 2), rows(10, 12)
    for x in (first, second):
        assert_close(door(jbn.init(1)[1], x, epsilon=0.0)[0], rows(-1, 1), TOLERANCE)
    joint, _ = door(jbn.init(1)[1], np.concatenate([first, second]), epsilon=0.0)
    np.testing.assert_allclose(joint, rows(-1.18, -0.78, 0.78, 1.18), atol=5e-3)
