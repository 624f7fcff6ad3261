"""Measuring a batch: on one device in one pass, merged exactly over many.

The one hard thing about batch norm in float32 is that a mean of 1e4 leaves no digits for a variance of 1.
So a mean is carried as two numbers, `shift + rest`: the shift lies near the data and is subtracted from x
first, which is exact or nearly so, and the rest is small and keeps all its digits.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from jbn._core.devices import Reduction
from jbn._core.dtypes import X, sharded_like, wide
from jbn._core.shift import Total, Use, centre, near, or_one, per_row, used, zeroed
from jbn._core.xla import two_sums

# Up to so many devices one collective carries a table of every device's moments, which is then merged
# exactly. Beyond, its bytes would grow with the devices, and two collectives of constant size take over.
_TABLE_DEVICES = 8

# Where the mean of the batches before, if it is near, is a better shift than rows of x. XLA for TPUs sums
# inside of the convolution that makes x, which it cannot as long as the sums wait for rows of x. Elsewhere
# rows cost nothing, and XLA for GPUs would always make the second pass.
_GUESSES = "tpu"


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


def measure(x: X, weights: Array | None, reduction: Reduction, guess: Array | None = None) -> Measured:
    """Moments of x over the axes and devices of `reduction`, in float32 or wider.

    - One pass about a shift near the data, never E[x^2] - E[x]^2 on raw x.
    - A constant channel has variance 0 exactly: the shift is then its value.
    - Weights are 0 or False for entries that take no part, whatever they hold.
    - Differentiable to any order: the shift is a constant, and drops out of every derivative.
    - `guess` may tell where the mean lies, of x's rank; a bad one, and under vmap any, costs a pass on a TPU,
      and no accuracy.
    """
    if jnp.iscomplexobj(x):
        return _measure_complex(x, weights, reduction, guess)
    local = _measure_local(x, weights, reduction.axes, guess)
    if reduction.axis_name is None:
        return local
    return over_devices(local, reduction)


def _measure_complex(x: X, weights: Array | None, reduction: Reduction, guess: Array | None) -> Measured:
    """Real and imaginary parts side by side along a new first axis: one reduction serves both."""
    weights = None if weights is None else weights[None]
    guess = None if guess is None else _parts(guess)
    moved = dataclasses.replace(reduction, axes=tuple(axis + 1 for axis in reduction.axes))
    return _joined(measure(_parts(x), weights, moved, guess))


def _parts(value: Array) -> Array:
    return jnp.stack([jnp.real(value), jnp.imag(value)])


def _joined(parts: Measured) -> Measured:
    """Real and imaginary parts along a first axis as complex moments."""
    total, values, shift, rest, var = parts
    return Measured(total[0], values[0], lax.complex(*shift), lax.complex(*rest), var[0] + var[1])


class Sums(NamedTuple):
    """What is summed about a shift: the last three of `Measured`."""

    shift: Array
    rest: Array
    var: Array


def _measure_local(x: X, weights: Array | None, axes: tuple[int, ...], guess: Array | None) -> Measured:
    total, values = _counts(x, weights, axes)
    about = functools.partial(_about, x, weights, axes, total)

    def about_rows() -> Sums:
        return about(lax.stop_gradient(near(x, weights, axes, total)))

    def about_guess(guess: Array) -> Sums:
        """About the guess where it lies within a deviation of the mean, in every channel; else about rows."""
        guess = jnp.where(jnp.isfinite(guess), jnp.real(guess), 0).astype(wide(x.dtype))
        shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
        guess = lax.stop_gradient(sharded_like(jnp.broadcast_to(guess, shape), x))
        sums = about(guess)
        rows = sharded_like(jnp.broadcast_to(total, guess.shape), guess)
        shift = jnp.where(rows > 0, guess, jnp.zeros_like(guess))
        sums = sums._replace(shift=shift + jnp.zeros_like(sums.rest))  # as varying over devices as the rest
        near_it = jnp.all(sums.rest * sums.rest <= sums.var)  # what has overflowed is not
        return Sums(*lax.cond(near_it, lambda: sums, about_rows))

    if guess is None:
        sums = about_rows()
    else:
        about_it = functools.partial(about_guess, guess)
        sums = Sums(*lax.platform_dependent(**{_GUESSES: about_it}, default=about_rows))
    total, values = (sharded_like(jnp.broadcast_to(n, sums.rest.shape), sums.rest) for n in (total, values))
    return Measured(total, values, *sums)


def _about(x: X, weights: Array | None, axes: tuple[int, ...], total: Total, shift: Array) -> Sums:
    offset = centre(x, shift, weights, Use.VARIANCE)
    first, second = two_sums(x, centre(x, shift, weights, Use.MEAN), offset * offset, weights, axes)
    rest = per_row(first, total)
    return Sums(shift, rest, _not_negative(per_row(second, total) - rest * rest))


def known_rows(x: X, weights: Array | None, axes: tuple[int, ...]) -> int | None:
    """How many rows are measured on this device; None where only the program will know."""
    rows = math.prod(x.shape[axis] for axis in axes)
    return rows if weights is None and isinstance(rows, int) else None


def _counts(x: X, weights: Array | None, axes: tuple[int, ...]) -> tuple[Total, Total]:
    """Sum of the weights and number of entries that take part."""
    dtype, known = wide(x.dtype), known_rows(x, weights, axes)
    if known is not None:
        return dtype.type(known), dtype.type(known)
    if weights is None:
        rows = jnp.full([1] * x.ndim, math.prod(x.shape[axis] for axis in axes), dtype)
        return rows, rows
    # The mask may be 1 along an axis of x: each of its entries then stands for as many of x.
    repeats = math.prod(x.shape[axis] for axis in axes if weights.shape[axis] == 1)
    values = repeats * jnp.sum(used(weights), axes, dtype=dtype, keepdims=True)
    if weights.dtype == bool:
        return values, values
    return repeats * jnp.sum(zeroed(weights.astype(dtype), weights), axes, keepdims=True), values


def expectations(sums: Array, total: Total, reduction: Reduction) -> Array:
    """The means that belong to stacked sums of this device, over rows and devices, in one collective.

    `total` is over all devices, as that of `measure`, or a number; where it is 0 the mean is 0.
    """
    return per_row(reduction.pmean(sums), total / reduction.size)


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
    if devices > _TABLE_DEVICES or not reduction.has_index():
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
    rest, square = first / or_one(total), second / or_one(total)
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
    share = total / or_one(all_rows)[None]
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
    if epsilon >= jnp.finfo(var.dtype).tiny:
        return lax.rsqrt(square)  # var is not negative: there is no 0
    positive = square != 0
    return jnp.where(
        positive, lax.rsqrt(jnp.where(positive, square, jnp.ones_like(square))), jnp.zeros_like(var)
    )


def dot(x: Array, y: Array) -> Array:
    """The real part of conj(x) y: the product that variance is made of."""
    return lax.real(lax.conj(x) * y) if jnp.iscomplexobj(x) else x * y


def _not_negative(var: Array) -> Array:
    """Round-off below 0 is cut off; the derivative, which has none, is left alone, and NaN stays NaN."""
    return var + lax.stop_gradient(jnp.maximum(-var, 0))
