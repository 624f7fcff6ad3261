"""The shift: a constant near the data, which is subtracted from x before anything is summed."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jbn._core.dtypes import reduction_dtype
from jbn._core.sharding import in_auto_mode, partition_spec
from jbn._core.types import X
from jbn._core.weights import Count, apply_weights, divide_by_count, is_valid, safe_count, zero_masked
from jbn._core.xla import DifferenceUse, difference

# The rows whose mean is the shift, and how many are taken along the first axis and each other to begin with.
# One row would do, but then (shift - mean)^2 is of the size of the variance, in the worst of many channels
# ten times it, and as much larger is the error of E[(x - shift)^2] - (mean - shift)^2. With the mean of 32 it
# is 1.3 times what it would be with the mean itself, instead of 11 times.
_SHIFT_ROWS, _EXAMPLES, _ROWS_PER_AXIS = 32, 8, 2
# 2^32 / golden ratio: its multiples modulo 2^32 are spread evenly, and those of every third number as well.
_GOLDEN = np.uint32(2654435769)
# Odd, so that its multiples modulo 32 visit each number: over several axes they form a lattice.
_LATTICE = 13

_MOST_PLACES = 2**24
"""Above, the number of a place leaves too few bits to compare ways by."""


def center(x: X, shift: Array, weights: Array | None, use: DifferenceUse = DifferenceUse.ENTRIES) -> Array:
    """x - shift, and 0 for entries that take no part."""
    return zero_masked(difference(x, shift, use), weights)


def pick_shift(x: X, weights: Array | None, axes: tuple[int, ...], weight: Count) -> Array:
    """A constant near the data, per channel: the mean of some rows, or of all.

    n of N rows bound (shift - mean)^2 by N/n times the variance, so that however far out they lie, the
    relative error of the variance stays below N/n times that of a sum. They are a slice of x where that can
    be, and gathered elsewhere: under a mask some rows are padding, and a dimension that is sharded over an
    explicit mesh axis, or whose size is symbolic, has no slices. Under a mask that is not small beside x,
    all rows are taken; `weight` is the sum of their weights.
    """
    dtype = reduction_dtype(x.dtype)
    if not all(x.shape[axis] for axis in axes):
        return jnp.zeros([1 if axis in axes else size for axis, size in enumerate(x.shape)], dtype)
    if not axes:  # each entry is a channel, of which other devices have more
        return zero_masked(x, weights).astype(dtype)
    if weights is None and _can_be_cut(x, axes):
        return _exact_mean(subsample(x, axes).astype(dtype), axes)
    if weights is not None and not _is_small(weights, x):
        return _mean_within_range(x.astype(dtype), weights, axes, weight)
    spec = (None, *(None if axis in axes else names for axis, names in enumerate(partition_spec(x))))
    rows = in_auto_mode(functools.partial(draw_rows, axes=axes), x, spec)(x, weights)
    return _exact_mean(rows.astype(dtype), (0,))[0]


def _can_be_cut(x: X, axes: tuple[int, ...]) -> bool:
    """Whether rows can be taken from the front: not over explicit mesh axes, nor of unknown size."""
    spec = partition_spec(x)
    return all(isinstance(x.shape[axis], int) and spec[axis] is None for axis in axes)


def _is_small(weights: Array, x: X) -> bool:
    """Whether drawing, which looks at each weight in each turn, is less work than to read x."""
    sizes = (*weights.shape, *x.shape)
    if not all(isinstance(size, int) for size in sizes):
        return True
    return weights.size <= min(x.size // _SHIFT_ROWS, _MOST_PLACES)


def _mean_within_range(rows: Array, weights: Array, axes: tuple[int, ...], weight: Count) -> Array:
    """The mean of all rows that take part; of rows that are equal, exactly their value."""
    valid = is_valid(weights)
    low = jnp.min(rows, axes, keepdims=True, where=valid, initial=np.inf)
    high = jnp.max(rows, axes, keepdims=True, where=valid, initial=-np.inf)
    sums = jnp.sum(apply_weights(zero_masked(rows, weights), weights), axes, keepdims=True)
    mean = divide_by_count(sums, weight)
    return jnp.where(low > high, jnp.zeros_like(mean), jnp.clip(mean, low, high))


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


def draw_rows(x: X, weights: Array | None, axes: tuple[int, ...]) -> X:
    """`_SHIFT_ROWS` rows that take part, as often as they weigh, along a new first axis; 0 where none does.

    Along axes of which the weights say nothing, they are spread evenly. Along the others an example is drawn
    first, then one of its entries, so that all weights are read once, and those of drawn examples again. A
    row may come more than once: a power of two of rows have a mean that rounds nothing, as in `subsample`.
    """
    weights = jnp.ones([1] * x.ndim, bool) if weights is None else lax.stop_gradient(weights)
    masked = [axis for axis in axes if weights.shape[axis] != 1]
    places = {
        axis: _spread(x.shape[axis], _turns(level, x.ndim))
        for level, axis in enumerate(axes)
        if axis not in masked
    }
    left, found = weights[None], is_valid(weights)[None]
    if masked:
        drawn, found = _draw(left, axes, masked[:1], _turns(0, x.ndim))
        places |= drawn
    if masked[1:]:
        left = jnp.take_along_axis(left, places[masked[0]], 1 + masked[0], mode="promise_in_bounds")
        drawn, found = _draw(left, axes, masked[1:], _turns(1, x.ndim))
        places |= drawn
    own = tuple(axis for axis in range(x.ndim) if axis not in axes and weights.shape[axis] != 1)
    rows = _rows_at(lax.stop_gradient(x), places, own)
    return jnp.where(found, rows, jnp.zeros_like(rows))


def _turns(level: int, ndim: int) -> Array:
    """0 to 31 along a first axis, in another order at each level."""
    in_order = lax.broadcasted_iota(np.int32, [_SHIFT_ROWS, *[1] * ndim], 0)
    turns: Array = in_order * (_LATTICE**level % _SHIFT_ROWS) & (_SHIFT_ROWS - 1)
    return turns


def _spread(size: int, turns: Array) -> Array:
    """turns * size / 32, rounded down; size may be symbolic, and the product beyond int32."""
    rest = lax.div(turns * (size % _SHIFT_ROWS), np.int32(_SHIFT_ROWS))
    return turns * (size // _SHIFT_ROWS) + rest


def _draw(
    weights: Array, axes: tuple[int, ...], group: list[int], turns: Array
) -> tuple[dict[int, Array], Array]:
    """For each turn a place along the axes of the group, by weight, and whether any has a weight.

    Places lie on a circle, at angles place * golden ratio. Each turn starts at another angle and draws the
    place that it comes to first, where one of twice the weight is half as far. That is one minimum, of
    numbers whose last bits are the place: under jit of a sharded batch each further reduction is a
    collective, and a prefix sum is several.
    """
    others = tuple(1 + axis for axis in axes if axis not in group)
    least = np.finfo(np.float32).tiny  # float64 weights may be below, and take part all the same
    each = jnp.maximum(weights.astype(np.float32), least)
    share = jnp.sum(zero_masked(each, weights), others, keepdims=True)
    bits = {axis: _bits(share.shape[1 + axis]) for axis in group}
    place = jnp.zeros([1] * share.ndim, np.int32)
    for axis in group:
        shape = [size if other == 1 + axis else 1 for other, size in enumerate(share.shape)]
        place = place << bits[axis] | lax.broadcasted_iota(np.int32, shape, 1 + axis)
    start = turns.astype(np.uint32) * np.uint32(2**32 // _SHIFT_ROWS)
    # From place 1 on: at an angle of 0 the least weight would be drawn.
    angle = ((place.astype(np.uint32) + np.uint32(1)) * _GOLDEN + start) >> 1
    way = angle.astype(np.float32) / safe_count(share)
    key = lax.bitcast_convert_type(way, np.int32)  # orders floats from 0 up as they are ordered
    all_bits, none = sum(bits.values()), np.iinfo(np.int32).max
    key = jnp.where(share > 0, key >> all_bits << all_bits | place, none)
    first = jnp.min(key, [1 + axis for axis in group], keepdims=True)
    found, drawn = first < none, {}
    for axis in reversed(group):
        drawn[axis] = jnp.where(found, first & ((1 << bits[axis]) - 1), 0)
        first = first >> bits[axis]
    return drawn, found


def _bits(size: int) -> int | Array:
    """How many bits hold a place along an axis of this size, which may be symbolic."""
    if isinstance(size, int):
        return (size - 1).bit_length()
    return 32 - lax.clz(jnp.full((), size - 1, np.int32))


def _rows_at(x: X, places: dict[int, Array], own: tuple[int, ...]) -> X:
    """The rows at these places, along a new first axis; along the axes `own` each index has its own."""
    shape = [_SHIFT_ROWS, *(x.shape[axis] for axis in own)]
    shared = tuple(1 + axis for axis in range(x.ndim) if axis not in own)
    index = [jnp.broadcast_to(lax.squeeze(place, shared), shape) for place in places.values()]
    numbers = lax.GatherDimensionNumbers(
        offset_dims=shared,
        collapsed_slice_dims=(),
        start_index_map=tuple(places),
        operand_batching_dims=own,
        start_indices_batching_dims=tuple(range(1, 1 + len(own))),
    )
    sizes = [1 if axis in places or axis in own else size for axis, size in enumerate(x.shape)]
    return lax.gather(x, jnp.stack(index, -1), numbers, sizes, mode="promise_in_bounds")


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
