"""The rows whose mean is the shift: enough of them, spread over the batch, and exact where they are equal."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn._core.shift import pick_shift, subsample
from tests.support.compiling import optimized


@pytest.mark.parametrize(
    ("shape", "axes", "rows"),
    [
        ((4096, 5), (0,), (32,)),
        ((7, 3), (0,), (4,)),
        ((256, 7, 7, 8), (0, 1, 2), (8, 2, 2)),
        ((1, 64, 64, 3), (0, 1, 2), (1, 16, 2)),
        ((8, 9, 3), (0, 1), (8, 4)),
        ((3, 1000, 4), (0, 1), (2, 16)),
        ((4, 3, 6, 5), (0, 2, 3), (4, 4, 2)),
        ((3, 20), (1,), (16,)),
    ],
)
def test_thirty_two_rows_or_as_many_as_can_be(shape, axes, rows):
    found = subsample(jnp.zeros(shape), axes)
    assert tuple(found.shape[axis] for axis in axes) == rows


def test_they_are_spread_over_the_batch():
    x = jnp.arange(64.0)[:, None]
    np.testing.assert_array_equal(subsample(x, (0,))[:, 0], np.arange(0, 64, 2))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-3, 12345.678, -2.7e4])
def test_equal_rows_have_exactly_their_value(value, dtype):
    """32 times 0.1, added one by one, is no multiple of it any more."""
    x = jnp.full((96, 3), value, dtype)
    shift = optimized(lambda x: pick_shift(x, None, (0,), jnp.ones((1, 1))))(x)
    np.testing.assert_array_equal(shift, x[:1].astype(np.float32))


def test_rows_that_are_nearly_equal_have_a_shift_near_them():
    x = 1e4 + 1e-3 * np.arange(-32, 32, dtype=np.float32)[:, None]
    shift = pick_shift(jnp.asarray(x, jnp.float32), None, (0,), jnp.ones((1, 1)))
    assert x.min() <= float(shift[0, 0]) <= x.max()


@pytest.mark.parametrize("value", [1e-30, 1e30, 1e38, 3e38, -3e38])
def test_no_constant_is_too_large_or_small(value):
    x = jnp.full((96, 3), value, jnp.float32)
    step = optimized(functools.partial(jbn.batch_norm, use_running_average=False, momentum=0.0))
    y, new = step(None, {"mean": jnp.zeros(3), "var": jnp.ones(3)}, x)
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(new["mean"], np.float32(value))
    np.testing.assert_array_equal(new["var"], 0)


@pytest.mark.parametrize(("location", "first", "spread"), [(1e6, 3.0, 0.05), (1e4, 0.03, 5e-4)])
def test_a_first_row_far_out_is_one_of_many(location, first, spread):
    x = np.random.default_rng(0).normal(location, spread, (100_000, 4)).astype(np.float32)
    x[0] = location + first
    var = np.asarray(optimized(jbn.moments)(x).var, np.float64)
    assert np.abs(var / x.astype(np.float64).var(0) - 1).max() < 1e-6


@pytest.mark.parametrize("shape", [(16, 0), (4, 4, 0), (0, 3), (0, 0)])
def test_nothing_to_measure(shape):
    assert jbn.moments(jnp.zeros(shape)).var.shape == shape[-1:]
