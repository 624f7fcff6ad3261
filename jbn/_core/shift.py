"""The shift: a constant near the data, which is subtracted from x before anything is summed."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jbn._core.dtypes import reduction_dtype
from jbn._core.sharding import partition_spec
from jbn._core.types import X
from jbn._core.weights import Count, apply_weights, divide_by_count, is_valid, zero_masked
from jbn._core.xla import DifferenceUse, difference

# The rows whose mean is the shift, and how many are taken along the first axis and each other to begin with.
# One row would do, but then (shift - mean)^2 is of the size of the variance, in the worst of many channels
# ten times it, and as much larger is the error of E[(x - shift)^2] - (mean - shift)^2. With the mean of 32 it
# is 1.3 times what it would be with the mean itself, instead of 11 times.
_SHIFT_ROWS, _EXAMPLES, _ROWS_PER_AXIS = 32, 8, 2


def center(x: X, shift: Array, weights: Array | None, use: DifferenceUse = DifferenceUse.ENTRIES) -> Array:
    """x - shift, and 0 for entries that take no part."""
    return zero_masked(difference(x, shift, use), weights)


def pick_shift(x: X, weights: Array | None, axes: tuple[int, ...], count: Count) -> Array:
    """A constant near the data, per channel: the mean of some rows, or of all rows.

    n of N rows bound (shift - mean)^2 by N/n times the variance, so that however far out they lie, the
    relative error of the variance stays below N/n times that of a sum. All rows, which have to be read once
    or twice more, are taken where some cannot be: under a mask they may be padding, and a dimension that is
    sharded over an explicit mesh axis, or whose size is symbolic, cannot be cut.
    """
    dtype = reduction_dtype(x.dtype)
    if not all(x.shape[axis] for axis in axes):
        return jnp.zeros([1 if axis in axes else size for axis, size in enumerate(x.shape)], dtype)
    if weights is None and _can_be_cut(x, axes):
        return _exact_mean(subsample(x, axes).astype(dtype), axes)
    valid, rows = None if weights is None else is_valid(weights), x.astype(dtype)
    low = jnp.min(rows, axes, keepdims=True, where=valid, initial=np.inf)
    high = jnp.max(rows, axes, keepdims=True, where=valid, initial=-np.inf)
    sums = jnp.sum(apply_weights(zero_masked(rows, weights), weights), axes, keepdims=True)
    mean = divide_by_count(sums, count)
    return jnp.where(low > high, jnp.zeros_like(mean), jnp.clip(mean, low, high))


def _can_be_cut(x: X, axes: tuple[int, ...]) -> bool:
    """Whether rows can be taken from the front: not over explicit mesh axes, nor of unknown size."""
    spec = partition_spec(x)
    return bool(axes) and all(isinstance(x.shape[axis], int) and spec[axis] is None for axis in axes)


def subsample(x: X, axes: tuple[int, ...]) -> X:
    """`_SHIFT_ROWS` rows, or more where there are many axes, or as many as can be.

    Cut before any conversion of dtype, and spread over all of x: its first examples may be blank. Along each
    axis a power of two, so that to divide their sum rounds nothing, and every kernel that computes the
    shift again, with a fused multiply-add or without, finds the same.
    """
    taken = {axis: min(_power_of_two(x.shape[axis]), _ROWS_PER_AXIS) for axis in axes}
    taken[axes[0]] = min(_power_of_two(x.shape[axes[0]]), _EXAMPLES)
    while math.prod(taken.values()) < _SHIFT_ROWS:
        room = [axis for axis in axes if 2 * taken[axis] <= x.shape[axis]]
        if not room:
            break
        taken[room[0]] *= 2
    steps = [size // taken[axis] if axis in taken else 1 for axis, size in enumerate(x.shape)]
    limits = [
        (taken[axis] - 1) * steps[axis] + 1 if axis in taken else size for axis, size in enumerate(x.shape)
    ]
    return lax.slice(x, [0] * x.ndim, limits, steps)


def _exact_mean(rows: Array, axes: tuple[int, ...]) -> Array:
    """The mean of a power of two of rows; of rows that are equal, exactly their value.

    For that each row is split into leading and other digits: a sum of equal ones then rounds nothing.
    As two sums, that of sharded rows both travel in one collective.
    """
    rows = rows / math.prod(rows.shape[axis] for axis in axes)  # first, or rows of 1e38 would overflow
    digits = jnp.finfo(rows.dtype)
    leading = lax.reduce_precision(rows, digits.nexp, digits.nmant // 2)
    first, second = (jnp.sum(part, axes, keepdims=True) for part in (leading, rows - leading))
    return first + second


def _power_of_two(size: int) -> int:
    """The largest one up to size."""
    return 1 << (size.bit_length() - 1)
