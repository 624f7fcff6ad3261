"""Measuring a batch: on one device in one pass, merged exactly over many.

The one hard thing about batch norm in float32 is that a mean of 1e4 leaves no digits for a variance of 1.
So a mean is carried as two numbers, `shift + delta`: the shift lies near the data and is subtracted from x
first, which is exact or nearly so, and delta is small and keeps all its digits.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from jbn._core.devices import Reduction
from jbn._core.dtypes import reduction_dtype
from jbn._core.sharding import sharded_like
from jbn._core.shift import center, pick_shift
from jbn._core.types import X
from jbn._core.weights import Count, divide_by_count, is_valid, safe_count, zero_masked
from jbn._core.xla import DifferenceUse, sum_pair, with_hint_on_tpu

# Up to so many devices one collective carries a table of every device's moments, which is then merged
# exactly. Beyond, its bytes would grow with the devices, and two collectives of constant size take over.
_TABLE_DEVICES = 8


class ShiftedMoments(NamedTuple):
    """Moments as the core keeps them: of x's rank, 1 along the reduced axes, and the mean in two parts.

    `weight` is the sum of the weights, `num_valid` the number of entries with a weight above 0, which
    decides whether a batch has a variance at all. They differ for fractional weights only. The mean is
    `shift + delta`, and `var` is biased.
    """

    weight: Float[Array, "..."]
    num_valid: Float[Array, "..."]
    shift: Num[Array, "..."]
    delta: Num[Array, "..."]
    var: Float[Array, "..."]


class AboutShift(NamedTuple):
    """What is measured about a shift: the last three of `ShiftedMoments`."""

    shift: Array
    delta: Array
    var: Array


def measure(
    x: X, weights: Array | None, reduction: Reduction, shift_hint: Array | None = None
) -> ShiftedMoments:
    """Moments of x over the axes and devices of `reduction`, in float32 or wider.

    - One pass about a shift near the data, never E[x^2] - E[x]^2 on raw x.
    - A constant channel has variance 0 exactly: the shift is then its value.
    - Weights are 0 or False for entries that take no part, whatever they hold.
    - Differentiable to any order: the shift is a constant, and drops out of every derivative.
    - `shift_hint`, of x's rank, may tell where the mean lies; a bad one, and under vmap any, costs a pass on
      a TPU, and no accuracy.
    """
    if jnp.iscomplexobj(x):
        return _measure_complex(x, weights, reduction, shift_hint)
    local = _measure_local(x, weights, reduction.axes, shift_hint)
    if reduction.axis_name is None:
        return local
    return merge_across_devices(local, reduction)


def _measure_complex(
    x: X, weights: Array | None, reduction: Reduction, shift_hint: Array | None
) -> ShiftedMoments:
    """Real and imaginary parts side by side along a new first axis: one reduction serves both."""
    weights = None if weights is None else weights[None]
    shift_hint = None if shift_hint is None else _parts(shift_hint)
    moved = dataclasses.replace(reduction, axes=tuple(axis + 1 for axis in reduction.axes))
    return _joined(measure(_parts(x), weights, moved, shift_hint))


def _parts(value: Array) -> Array:
    return jnp.stack([jnp.real(value), jnp.imag(value)])


def _joined(parts: ShiftedMoments) -> ShiftedMoments:
    """Real and imaginary parts along a first axis as complex moments."""
    weight, num_valid, shift, delta, var = parts
    return ShiftedMoments(weight[0], num_valid[0], lax.complex(*shift), lax.complex(*delta), var[0] + var[1])


def _measure_local(
    x: X, weights: Array | None, axes: tuple[int, ...], shift_hint: Array | None
) -> ShiftedMoments:
    """The moments of this device's rows."""
    weight, num_valid = _counts(x, weights, axes)
    about = functools.partial(_measure_about, x, weights, axes, weight)

    def about_rows() -> AboutShift:
        return about(lax.stop_gradient(pick_shift(x, weights, axes, weight)))

    if shift_hint is None:
        found = about_rows()
    else:
        about_hint = functools.partial(_about_hint, x, axes, weight, shift_hint, about, about_rows)
        found = AboutShift(*with_hint_on_tpu(about_hint, about_rows))
    weight, num_valid = (
        sharded_like(jnp.broadcast_to(n, found.delta.shape), found.delta) for n in (weight, num_valid)
    )
    return ShiftedMoments(weight, num_valid, *found)


def _measure_about(
    x: X, weights: Array | None, axes: tuple[int, ...], weight: Count, shift: Array
) -> AboutShift:
    """delta = E[x - shift] and var = E[(x - shift)^2] - delta^2, in one pass over x."""
    offset = center(x, shift, weights, DifferenceUse.VARIANCE)
    first, second = sum_pair(x, center(x, shift, weights, DifferenceUse.MEAN), offset * offset, weights, axes)
    delta = divide_by_count(first, weight)
    return AboutShift(shift, delta, _not_negative(divide_by_count(second, weight) - delta * delta))


def _about_hint(
    x: X,
    axes: tuple[int, ...],
    weight: Count,
    shift_hint: Array,
    about: Callable[[Array], AboutShift],
    about_rows: Callable[[], AboutShift],
) -> AboutShift:
    """About the hint where it lies within a deviation of the mean, in every channel; else about rows."""
    hint = jnp.where(jnp.isfinite(shift_hint), jnp.real(shift_hint), 0).astype(reduction_dtype(x.dtype))
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    hint = lax.stop_gradient(sharded_like(jnp.broadcast_to(hint, shape), x))
    found = about(hint)
    weight = sharded_like(jnp.broadcast_to(weight, hint.shape), hint)
    shift = jnp.where(weight > 0, hint, jnp.zeros_like(hint))
    found = found._replace(shift=shift + jnp.zeros_like(found.delta))  # as varying over devices as delta
    is_near = jnp.all(found.delta * found.delta <= found.var)  # what has overflowed is not
    return AboutShift(*lax.cond(is_near, lambda: found, about_rows))


def static_count(x: X, weights: Array | None, axes: tuple[int, ...]) -> int | None:
    """How many rows are measured on this device; None where only the program will know."""
    rows = math.prod(x.shape[axis] for axis in axes)
    return rows if weights is None and isinstance(rows, int) else None


def _counts(x: X, weights: Array | None, axes: tuple[int, ...]) -> tuple[Count, Count]:
    """Sum of the weights and number of entries that take part."""
    dtype, known = reduction_dtype(x.dtype), static_count(x, weights, axes)
    if known is not None:
        return dtype.type(known), dtype.type(known)
    if weights is None:
        rows = jnp.full([1] * x.ndim, math.prod(x.shape[axis] for axis in axes), dtype)
        return rows, rows
    # The mask may be 1 along an axis of x: each of its entries then stands for as many of x.
    repeats = math.prod(x.shape[axis] for axis in axes if weights.shape[axis] == 1)
    num_valid = repeats * jnp.sum(is_valid(weights), axes, dtype=dtype, keepdims=True)
    if weights.dtype == bool:
        return num_valid, num_valid
    return repeats * jnp.sum(zero_masked(weights.astype(dtype), weights), axes, keepdims=True), num_valid


def global_means(sums: Array, weight: Count, reduction: Reduction) -> Array:
    """The means that belong to stacked sums of this device, over rows and devices, in one collective.

    `weight` is over all devices, as that of `measure`, or a number; where it is 0 the mean is 0.
    """
    return divide_by_count(reduction.pmean(sums), weight / reduction.size)


def merge_across_devices(local: ShiftedMoments, reduction: Reduction) -> ShiftedMoments:
    """The moments of the rows of all devices, the same on each of them."""
    if jnp.iscomplexobj(local.delta):
        weight, num_valid, shift, delta, var = local
        pairs = (
            (weight, weight),
            (num_valid, num_valid),
            *((part.real, part.imag) for part in (shift, delta)),
            (var, jnp.zeros_like(var)),
        )
        return _joined(merge_across_devices(ShiftedMoments(*map(jnp.stack, pairs)), reduction))
    devices = reduction.size
    if devices > _TABLE_DEVICES or not reduction.has_index():
        return _merge_across_many(local, reduction)
    own = jnp.stack(local)
    here = jnp.arange(devices, dtype=np.int32) == reduction.index()
    table = jnp.where(jnp.expand_dims(here, range(1, own.ndim + 1)), own[None], jnp.zeros_like(own)[None])
    merged: ShiftedMoments = merge_shifted(ShiftedMoments(*jnp.moveaxis(reduction.psum(table), 1, 0)))
    return merged


def _merge_across_many(local: ShiftedMoments, reduction: Reduction) -> ShiftedMoments:
    """Two collectives of constant size: a shift common to all, then the sums about it.

    The common shift is the largest of the devices' means: like theirs, it leaves a constant channel exact.
    """
    weight, num_valid, shift, delta, var = local
    lowest = jnp.full_like(shift, -jnp.inf)
    common = reduction.pmax(lax.stop_gradient(jnp.where(weight > 0, shift + delta, lowest)))
    common = jnp.where(jnp.isneginf(common), jnp.zeros_like(common), common)
    offset = jnp.where(weight > 0, (shift - common) + delta, jnp.zeros_like(delta))
    sums = jnp.stack([weight, num_valid, weight * offset, weight * (var + offset * offset)])
    weight, num_valid, first, second = reduction.psum(sums)
    delta, square = first / safe_count(weight), second / safe_count(weight)
    # delta = E[x - common], var = E[(x - common)^2] - delta^2, of the rows of all devices
    return ShiftedMoments(weight, num_valid, common, delta, _not_negative(square - delta * delta))


@functools.partial(jax.jit, inline=True)
def merge_shifted(parts: ShiftedMoments) -> ShiftedMoments:
    """Moments along a first axis into one, as if all rows had come in one batch.

    var = sum of share_i * (var_i + |mean_i - mean|^2): the variance of the means belongs to the variance.
    """
    weight, num_valid, shift, delta, var = parts
    has_rows, total = weight > 0, jnp.sum(weight, 0)
    common = lax.stop_gradient(_largest(shift, has_rows))
    offset = jnp.where(has_rows, (shift - common[None]) + delta, jnp.zeros_like(delta))
    share = weight / safe_count(total)[None]
    mean = jnp.sum(share.astype(offset.dtype) * offset, 0)
    from_mean = offset - mean[None]
    square = jnp.where(has_rows, var, jnp.zeros_like(var)) + real_product(from_mean, from_mean)
    return ShiftedMoments(total, jnp.sum(num_valid, 0), common, mean, jnp.sum(share * square, 0))


def _largest(shift: Array, has_rows: Bool[Array, "..."]) -> Array:
    """The largest of the shifts along a first axis that have rows: near the data, exact if all are equal."""
    if jnp.iscomplexobj(shift):
        return lax.complex(_largest(shift.real, has_rows), _largest(shift.imag, has_rows))
    largest = jnp.max(jnp.where(has_rows, shift, jnp.full_like(shift, -jnp.inf)), 0)
    return jnp.where(jnp.any(has_rows, 0), largest, jnp.zeros_like(largest))


def inverse_std(var: Float[Array, "..."], epsilon: float) -> Float[Array, "..."]:
    """1 / sqrt(var + epsilon), and 0 where both are 0: a constant channel then turns into bias, not NaN."""
    square = var + np.asarray(epsilon, var.dtype)
    if epsilon >= jnp.finfo(var.dtype).tiny:
        return lax.rsqrt(square)  # var is not negative: there is no 0
    positive = square != 0
    return jnp.where(
        positive, lax.rsqrt(jnp.where(positive, square, jnp.ones_like(square))), jnp.zeros_like(var)
    )


def real_product(x: Array, y: Array) -> Array:
    """The real part of conj(x) y: the product that variance is made of."""
    return lax.real(lax.conj(x) * y) if jnp.iscomplexobj(x) else x * y


def _not_negative(var: Array) -> Array:
    """Round-off below 0 is cut off; the derivative, which has none, is left alone, and NaN stays NaN."""
    return var + lax.stop_gradient(jnp.maximum(-var, 0))
