"""The shift: a constant near the data, which is subtracted from x before anything is summed."""

import enum
import math
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from jbn._core.dtypes import X, sharded_like, spec, wide

# The rows whose mean is the shift, and how many are taken along the first axis and each other to begin with.
# One row would do, but then (shift - mean)^2 is of the size of the variance, in the worst of many channels
# ten times it, and as much larger is the error of E[(x - shift)^2] - (mean - shift)^2. The mean of 32 makes
# that 1.3.
_SHIFT_ROWS, _EXAMPLES, _ROWS_PER_AXIS = 32, 8, 2

# What is known while tracing stays a number: the compiler would need time to find that an array is constant.
Total: TypeAlias = Array | np.floating[Any]


class Use(enum.Enum):
    """What x - shift is for: as many axes of size 1 make each use another expression to XLA.

    What one sum alone uses, XLA for CPUs computes inside of that sum. What something else uses too, it stores
    first: a pass to write, and one to read for each.
    """

    ENTRIES = 0
    MEAN = 1
    VARIANCE = 2
    GRADIENT = 3


def used(weights: Array) -> Bool[Array, "..."]:
    """Which entries take part."""
    return weights if weights.dtype == bool else weights > 0


def zeroed(value: Array, weights: Array | None) -> Array:
    """0 for entries that take no part."""
    return value if weights is None else jnp.where(used(weights), value, jnp.zeros_like(value))


def centre(x: X, shift: Array, weights: Array | None, use: Use = Use.ENTRIES) -> Array:
    """x - shift, and 0 for entries that take no part."""
    front = tuple(range(use.value))
    offset = jnp.expand_dims(x, front).astype(shift.dtype) - jnp.expand_dims(shift, front)
    return zeroed(lax.squeeze(offset, front), weights)


def near(x: X, weights: Array | None, axes: tuple[int, ...], total: Total) -> Array:
    """A constant near the data, per channel: the mean of some rows, or of all rows.

    n of N rows bound (shift - mean)^2 by N/n times the variance, so that however far out they lie, the
    relative error of the variance stays below N/n times that of a sum. All rows, which have to be read once
    or twice more, are taken where some cannot be: under a mask they may be padding, and a dimension that is
    sharded over an explicit mesh axis, or whose size is symbolic, cannot be cut.
    """
    dtype = wide(x.dtype)
    if not all(x.shape[axis] for axis in axes):
        return jnp.zeros([1 if axis in axes else size for axis, size in enumerate(x.shape)], dtype)
    if weights is None and _can_be_cut(x, axes):
        return _exact_mean(_some_rows(x, axes).astype(dtype), axes)
    taken, rows = None if weights is None else used(weights), x.astype(dtype)
    low = jnp.min(rows, axes, keepdims=True, where=taken, initial=np.inf)
    high = jnp.max(rows, axes, keepdims=True, where=taken, initial=-np.inf)
    mean = per_row(jnp.sum(weighted(zeroed(rows, weights), weights), axes, keepdims=True), total)
    return jnp.where(low > high, jnp.zeros_like(mean), jnp.clip(mean, low, high))


def _can_be_cut(x: X, axes: tuple[int, ...]) -> bool:
    """Whether rows can be taken from the front: not over explicit mesh axes, nor of unknown size."""
    return bool(axes) and all(isinstance(x.shape[axis], int) and spec(x)[axis] is None for axis in axes)


def _some_rows(x: X, axes: tuple[int, ...]) -> X:
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

    For that each is split into leading and other digits, of which a sum of equal ones rounds nothing.
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


def weighted(values: Array, weights: Array | None) -> Array:
    """Weight times value; values of entries that take no part are 0 already."""
    if weights is not None and weights.dtype != bool:
        values = values * zeroed(weights.astype(values.real.dtype), weights).astype(values.dtype)
    return values


def per_row(sums: Array, total: Total) -> Array:
    """Sums over rows, or several such stacked, divided by the number or the total weight of the rows."""
    if isinstance(total, np.floating):  # 0 or at least 1, being a number of rows
        return jnp.divide(sums, max(total, total.dtype.type(1)).astype(sums.dtype))
    divisor = or_one(total).astype(sums.dtype)
    if divisor.ndim < sums.ndim:
        return jnp.divide(sums, divisor[None])
    return jnp.divide(sums, sharded_like(jnp.broadcast_to(divisor, sums.shape), sums))


def or_one(total: Array) -> Array:
    """The total as a divisor: sums over no rows are 0 and stay 0."""
    return jnp.where(total > 0, total, jnp.ones_like(total))
