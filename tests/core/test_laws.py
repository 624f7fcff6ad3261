"""Laws of the statistics, for every batch: what is true of numbers is true of the code, but for rounding."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jbn
from tests.support.cases import assert_close, assert_trees_close, tolerance

TOLERANCE = tolerance(np.float32)
ROWS = st.integers(1, 12)
FINITE = st.floats(-1e3, 1e3, width=32)
few = settings(max_examples=30, deadline=None, derandomize=True)


def batches(rows=ROWS):
    """Arrays [rows, 2]."""
    return rows.flatmap(lambda n: hnp.arrays(np.float32, (n, 2), elements=FINITE))


def assert_moments_close(actual, expected):
    """To the size of the numbers that go in: means of 1000 differ by the roundings of 1000."""
    size = np.abs(np.asarray(expected.mean)).max(initial=1) ** 2 + np.asarray(expected.var).max(initial=1)
    np.testing.assert_array_equal(actual.count, expected.count)
    assert_close(actual.mean, expected.mean, TOLERANCE * np.sqrt(size))
    assert_close(actual.var / size, expected.var / size, TOLERANCE)


@few
@given(batches(), batches())
def test_merge_is_commutative(a, b):
    a, b = jbn.moments(a), jbn.moments(b)
    assert_moments_close(jbn.merge(a, b), jbn.merge(b, a))


@few
@given(batches(), batches(), batches())
def test_merge_is_associative(a, b, c):
    a, b, c = map(jbn.moments, (a, b, c))
    whole = jbn.merge(a, b, c)
    assert_moments_close(jbn.merge(jbn.merge(a, b), c), whole)
    assert_moments_close(jbn.merge(a, jbn.merge(b, c)), whole)


@few
@given(batches())
def test_no_rows_are_the_identity_of_merge(a):
    a, nothing = jbn.moments(a), jbn.moments(a[:0])
    assert_trees_close(jbn.merge(a, nothing), a, 0.0)
    assert_trees_close(jbn.merge(nothing, a), a, 0.0)


@few
@given(batches(st.integers(2, 24)), st.data())
def test_any_split_pools_to_the_whole(x, data):
    cuts = data.draw(st.lists(st.integers(0, len(x)), max_size=4).map(sorted))
    assert_moments_close(jbn.merge(*map(jbn.moments, np.split(x, cuts))), jbn.moments(x))


@few
@given(batches(), st.data())
def test_a_mask_is_a_deletion(x, data):
    mask = data.draw(hnp.arrays(bool, len(x)))
    assert_moments_close(jbn.moments(x, mask=mask), jbn.moments(x[mask]))


@few
@given(batches(st.integers(1, 6)), st.data())
def test_a_whole_weight_is_so_many_copies(x, data):
    weights = data.draw(hnp.arrays(np.int32, len(x), elements=st.integers(0, 3)))
    weighted = jbn.moments(x, mask=weights.astype(np.float32))
    assert_moments_close(weighted, jbn.moments(np.repeat(x, weights, axis=0)))


@few
@given(batches(), FINITE, st.integers(-8, 8))
def test_moments_follow_shift_and_scale(x, shift, power):
    """By powers of two, which round nothing: E[2x + b] = 2 E[x] + b, var[2x + b] = 4 var[x]."""
    scale = np.float32(2.0**power)
    moved, still = jbn.moments(x * scale + shift), jbn.moments(x)
    size = scale**2 * (np.abs(x).max() ** 2 + 1) + shift**2
    assert_close(moved.mean, still.mean * scale + shift, 4 * TOLERANCE * np.sqrt(size))
    assert_close(moved.var / size, still.var * scale**2 / size, 4 * TOLERANCE)


@few
@given(st.integers(0, 99), st.sampled_from([0.0, -3.0, 1e3]), st.integers(-6, 6))
def test_y_does_not_change_with_shift_and_scale_of_x(seed, shift, power):
    """Without epsilon, which has a scale."""
    x = np.random.default_rng(seed).standard_normal((16, 2)).astype(np.float32)
    y = lambda x: jbn.batch_norm(None, None, x, use_running_average=False, epsilon=0.0)[0]  # noqa: E731
    error = TOLERANCE * (1 + abs(shift) / 16)  # of x + shift, which is rounded before it comes here
    assert_close(y((x + np.float32(shift)) * np.float32(2.0**power)), y(x), error)


@few
@given(batches(st.integers(2, 12)), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(x, random):
    order = random.sample(range(len(x)), len(x))
    assert_moments_close(jbn.moments(x[order]), jbn.moments(x))


@few
@given(st.lists(batches(st.integers(2, 8)), min_size=1, max_size=4))
def test_cumulative_updates_are_a_merge(parts):
    stats = jbn.init(2, count=True)[1]
    for x in parts:
        stats = jbn.update(stats, jbn.moments(x), momentum=None)
    whole = jbn.moments(np.concatenate(parts))
    assert_moments_close(jbn.Moments(stats["rows"], stats["mean"], stats["var"]), whole)


@few
@given(batches(st.integers(2, 8)), st.floats(0, 1, width=32))
def test_an_update_lies_between_old_and_new(x, momentum):
    stats, batch = jbn.init(2)[1], jbn.moments(x)
    new = jbn.update(stats, batch, momentum=momentum)
    for name in ("mean", "var"):
        low, high = (f(stats[name], getattr(batch, name)) for f in (np.minimum, np.maximum))
        room = TOLERANCE * max(1.0, float(np.abs(high).max()), float(np.abs(low).max()))
        assert (new[name] >= low - room).all()
        assert (new[name] <= high + room).all()


def test_gradients_of_x_are_orthogonal_to_what_y_ignores():
    """y does not change if x is moved or stretched, so dx has no part along 1, nor, without epsilon, x."""
    x, cotangent = np.random.default_rng(0).standard_normal((2, 32, 3)).astype(np.float32)
    y = lambda x: jbn.batch_norm(None, None, x, use_running_average=False, epsilon=0.0)[0]  # noqa: E731
    (dx,) = jax.vjp(y, x)[1](cotangent)
    assert np.abs(dx).max() > 0.1
    assert_close(dx.sum(0), np.zeros(3), 4 * TOLERANCE)
    assert_close((dx * x).sum(0), np.zeros(3), 4 * TOLERANCE)
