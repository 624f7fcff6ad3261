"""Measuring a batch: on one device in one pass, merged exactly over many.

The one hard thing about batch norm in float32 is that a mean of 1e4 leaves no digits for a variance of 1.
So a mean is carried as two numbers, `shift + rest`: the shift lies near the data and is subtracted from x
first, which is exact or nearly so, and the rest is small and keeps all its digits.
"""

import dataclasses
import enum
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from jbn._devices import Reduction
from jbn._types import X, sharded_like, spec, wide

# The rows whose mean is the shift, and how many at most along an axis of an example. One row would do, but
# then (shift - mean)^2 is of the size of the variance, in the worst of many channels ten times it, and as
# much larger is the error of E[(x - shift)^2] - (mean - shift)^2. The mean of 32 rows makes that 1.3 times.
_SHIFT_ROWS, _ROWS_PER_AXIS = 32, 8

# Up to so many devices one collective carries a table of every device's moments, which is then merged
# exactly. Beyond, its bytes would grow with the devices, and two collectives of constant size take over.
_TABLE_DEVICES = 8


class Measured(NamedTuple):
    """Moments as the core keeps them: of x's rank, 1 along the reduced axes, and the mean in two parts.

    `total` is the sum of the weights, `values` the number of entries with a weight above 0, which decides
    whether a batch has a variance at all. They differ for fractional weights only.
    """

    total: Float[Array, "..."]
    values: Float[Array, "..."]
    shift: Num[Array, "..."]
    rest: Num[Array, "..."]
    var: Float[Array, "..."]


class Use(enum.Enum):
    """What x - shift is for: as many axes of size 1 make each use another expression to XLA.

    What one sum alone uses, XLA for CPUs computes inside of that sum. What something else uses too, it stores
    first: a pass to write, and one to read for each.
    """

    ENTRIES = 0
    MEAN = 1
    VARIANCE = 2
    GRADIENT = 3


def measure(x: X, weights: Array | None, reduction: Reduction) -> Measured:
    """Moments of x over the axes and devices of `reduction`, in float32 or wider.

    - One pass about a shift near the data, never E[x^2] - E[x]^2 on raw x.
    - A constant channel has variance 0 exactly: the shift never leaves the range of the values.
    - Weights are 0 or False for entries that take no part, whatever they hold.
    - Differentiable to any order: the shift is a constant, and drops out of every derivative.
    """
    if jnp.iscomplexobj(x):
        return _measure_complex(x, weights, reduction)
    local = _measure_local(x, weights, reduction.axes)
    if reduction.axis_name is None:
        return local
    return over_devices(local, reduction)


def _measure_complex(x: X, weights: Array | None, reduction: Reduction) -> Measured:
    """Real and imaginary parts side by side along a new first axis: one reduction serves both."""
    parts = jnp.stack([lax.real(x), lax.imag(x)])
    weights = None if weights is None else weights[None]
    moved = dataclasses.replace(reduction, axes=tuple(axis + 1 for axis in reduction.axes))
    return _joined(measure(parts, weights, moved))


def _joined(parts: Measured) -> Measured:
    """Real and imaginary parts along a first axis as complex moments."""
    total, values, shift, rest, var = parts
    return Measured(total[0], values[0], lax.complex(*shift), lax.complex(*rest), var[0] + var[1])


def _measure_local(x: X, weights: Array | None, axes: tuple[int, ...]) -> Measured:
    total, values = _counts(x, weights, axes)
    shift = lax.stop_gradient(_shift(x, weights, axes, total))
    total, values = (sharded_like(jnp.broadcast_to(n, shift.shape), shift) for n in (total, values))
    divisor = _or_one(total)
    rest = weighted_sum(centre(x, shift, weights, Use.MEAN), weights, axes) / divisor
    offset = centre(x, shift, weights, Use.VARIANCE)
    var = weighted_sum(offset * offset, weights, axes) / divisor - rest * rest
    return Measured(total, values, shift, rest, _not_negative(var))


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


def _shift(x: X, weights: Array | None, axes: tuple[int, ...], total: Array) -> Array:
    """A constant near the data, per channel: the mean of the first rows, or of all rows.

    The first n of N examples bound (shift - mean)^2 by N/n times the variance, so that however far out they
    lie, the relative error of the variance stays below N/n times that of a sum. All rows, at the price of
    one more pass, are taken where the first cannot be: under a mask they may be padding, and a dimension
    that is sharded over an explicit mesh axis, or whose size is symbolic, cannot be cut.
    """
    dtype = wide(x.dtype)
    if not all(x.shape[axis] for axis in axes):
        return jnp.zeros([1 if axis in axes else size for axis, size in enumerate(x.shape)], dtype)
    if weights is None and _can_be_cut(x, axes):
        first, rows = (value.astype(dtype) for value in _some_rows(x, axes))
        return first + jnp.mean(rows - first, axes, keepdims=True)  # exactly the value of a constant channel
    taken, rows = None if weights is None else used(weights), x.astype(dtype)
    low = jnp.min(rows, axes, keepdims=True, where=taken, initial=np.inf)
    high = jnp.max(rows, axes, keepdims=True, where=taken, initial=-np.inf)
    mean = weighted_sum(zeroed(rows, weights), weights, axes) / _or_one(total)
    return jnp.where(low > high, jnp.zeros_like(mean), jnp.clip(mean, low, high))


def _can_be_cut(x: X, axes: tuple[int, ...]) -> bool:
    """Whether rows can be taken from the front: not over explicit mesh axes, nor of unknown size."""
    return bool(axes) and all(isinstance(x.shape[axis], int) and spec(x)[axis] is None for axis in axes)


def _some_rows(x: X, axes: tuple[int, ...]) -> tuple[X, X]:
    """The first row, and rows of the first examples, `_SHIFT_ROWS` of them or more if there are as many.

    Cut before any conversion of dtype, and spread over an example: its first rows may be a border. Along
    each axis a power of two, so that to divide their sum rounds nothing, and every kernel that computes the
    shift again, with a fused multiply-add or without, finds the same.
    """
    sizes, steps = list(x.shape), [1] * x.ndim
    for axis in axes[1:]:
        sizes[axis] = min(_power_of_two(x.shape[axis]), _ROWS_PER_AXIS)
        steps[axis] = x.shape[axis] // sizes[axis]
    per_example = math.prod(sizes[axis] for axis in axes[1:])
    sizes[axes[0]] = min(_power_of_two(x.shape[axes[0]]), math.ceil(_SHIFT_ROWS / per_example))
    limits = [(size - 1) * step + 1 for size, step in zip(sizes, steps, strict=True)]
    rows = lax.slice(x, [0] * x.ndim, limits, steps)
    return lax.slice(x, [0] * x.ndim, [1 if a in axes else size for a, size in enumerate(x.shape)]), rows


def _power_of_two(size: int) -> int:
    """The largest one up to size."""
    return 1 << (size.bit_length() - 1)


def _counts(x: X, weights: Array | None, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Sum of the weights and number of entries that take part."""
    dtype = wide(x.dtype)
    if weights is None:
        rows = jnp.full([1] * x.ndim, math.prod(x.shape[axis] for axis in axes), dtype)
        return rows, rows
    # The mask may be 1 along an axis of x: each of its entries then stands for as many of x.
    repeats = math.prod(x.shape[axis] for axis in axes if weights.shape[axis] == 1)
    values = repeats * jnp.sum(used(weights), axes, dtype=dtype, keepdims=True)
    if weights.dtype == bool:
        return values, values
    return repeats * jnp.sum(zeroed(weights.astype(dtype), weights), axes, keepdims=True), values


def weighted_sum(values: Array, weights: Array | None, axes: tuple[int, ...]) -> Array:
    """Sum of weight times value; values of entries that take no part are 0 already."""
    if weights is not None and weights.dtype != bool:
        values = values * zeroed(weights.astype(values.real.dtype), weights)
    return jnp.sum(values, axes, keepdims=True)


def expectations(sums: Array, total: Array, reduction: Reduction) -> Array:
    """The means that belong to stacked sums of this device, over rows and devices, in one collective.

    `total` is that of `measure`, over all devices; where it is 0 the mean is 0.
    """
    per_device = _or_one(total) / reduction.size
    return reduction.pmean(sums) / per_device[None].astype(sums.dtype)


def over_devices(local: Measured, reduction: Reduction) -> Measured:
    """The moments of the rows of all devices, the same on each of them."""
    if jnp.iscomplexobj(local.rest):
        total, values, shift, rest, var = local
        pairs = (
            (total, total),
            (values, values),
            *((p.real, p.imag) for p in (shift, rest)),
            (var, jnp.zeros_like(var)),
        )
        return _joined(over_devices(Measured(*map(jnp.stack, pairs)), reduction))
    devices = reduction.size
    if devices > _TABLE_DEVICES:
        return _over_many_devices(local, reduction)
    rows = jnp.stack(local)
    here = jnp.arange(devices, dtype=np.int32) == reduction.index()
    table = jnp.where(jnp.expand_dims(here, range(1, rows.ndim + 1)), rows[None], jnp.zeros_like(rows)[None])
    merged: Measured = merge_measured(Measured(*jnp.moveaxis(reduction.psum(table), 1, 0)))
    return merged


def _over_many_devices(local: Measured, reduction: Reduction) -> Measured:
    """Two collectives of constant size: a shift common to all, then the sums about it.

    The common shift is the largest of the devices' means: like theirs, it leaves a constant channel exact.
    """
    total, values, shift, rest, var = local
    lowest = jnp.full_like(shift, -jnp.inf)
    common = reduction.pmax(lax.stop_gradient(jnp.where(total > 0, shift + rest, lowest)))
    common = jnp.where(jnp.isneginf(common), jnp.zeros_like(common), common)
    offset = jnp.where(total > 0, (shift - common) + rest, jnp.zeros_like(rest))
    sums = jnp.stack([total, values, total * offset, total * (var + offset * offset)])
    total, values, first, second = reduction.psum(sums)
    rest, square = first / _or_one(total), second / _or_one(total)
    return Measured(total, values, common, rest, _not_negative(square - rest * rest))


@functools.partial(jax.jit, inline=True)
def merge_measured(parts: Measured) -> Measured:
    """Moments along a first axis into one, as if all rows had come in one batch.

    var = sum of share * (var_i + |mean_i - mean|^2): the spread of the means belongs to the variance.
    """
    total, values, shift, rest, var = parts
    some, all_rows = total > 0, jnp.sum(total, 0)
    common = lax.stop_gradient(_largest(shift, some))
    offset = jnp.where(some, (shift - common[None]) + rest, jnp.zeros_like(rest))
    share = total / _or_one(all_rows)[None]
    mean = jnp.sum(share.astype(offset.dtype) * offset, 0)
    apart = offset - mean[None]
    spread = jnp.where(some, var, jnp.zeros_like(var)) + dot(apart, apart)
    return Measured(all_rows, jnp.sum(values, 0), common, mean, jnp.sum(share * spread, 0))


def _largest(shift: Array, some: Bool[Array, "..."]) -> Array:
    """The largest of the shifts along a first axis that have rows: near the data, exact if all are equal."""
    if jnp.iscomplexobj(shift):
        return lax.complex(_largest(shift.real, some), _largest(shift.imag, some))
    largest = jnp.max(jnp.where(some, shift, jnp.full_like(shift, -jnp.inf)), 0)
    return jnp.where(jnp.any(some, 0), largest, jnp.zeros_like(largest))


def inverse_deviation(var: Float[Array, "..."], epsilon: float) -> Float[Array, "..."]:
    """1 / sqrt(var + epsilon), and 0 where both are 0: a constant channel then turns into bias, not NaN."""
    square = var + np.asarray(epsilon, var.dtype)
    positive = square != 0
    return jnp.where(
        positive, lax.rsqrt(jnp.where(positive, square, jnp.ones_like(square))), jnp.zeros_like(var)
    )


def dot(x: Array, y: Array) -> Array:
    """The real part of conj(x) y: the product that variance is made of."""
    return lax.real(lax.conj(x) * y) if jnp.iscomplexobj(x) else x * y


def _or_one(total: Array) -> Array:
    """The total as a divisor: sums over no rows are 0 and stay 0."""
    return jnp.where(total > 0, total, jnp.ones_like(total))


def _not_negative(var: Array) -> Array:
    """Round-off below 0 is cut off; the derivative, which has none, is left alone, and NaN stays NaN."""
    return var + lax.stop_gradient(jnp.where(var < 0, -var, jnp.zeros_like(var)))
