"""Two sums of the same entries, and the way back from them, in the form that is fast on each platform.

XLA for CPUs computes a sum together with what it alone uses. What two sums use, it stores first, and of
values of 16 bits that is their conversion: 4 bytes to write for each 2 of x. A sum of complex numbers over a
short axis is one loop that reads each value once and makes both sums, so there pairs are added first.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jbn._core.dtypes import X, spec
from jbn._core.shift import weighted

# Of more than the most, XLA makes a loop that is not vectorized; of fewer than the least, too much is stored.
_MOST_PAIRS, _LEAST_PAIRS = 16, 4


def two_sums(
    x: X, first: Array, second: Array, weights: Array | None, axes: tuple[int, ...]
) -> tuple[Array, Array]:
    """The sums of both, which are made of x, over axes that are kept with size 1."""
    first, second = weighted(first, weights), weighted(second, weights)
    both = functools.partial(plain_sums, axes=axes)
    pairs = _pairs(x, axes)
    if pairs is None:
        return both(first, second)
    by_pairs = functools.partial(_both_by_pairs, axes=axes, pairs=pairs)
    sums: tuple[Array, Array] = lax.platform_dependent(first, second, cpu=by_pairs, default=both)
    return sums


def spread(x: X, constant: Array, slope: Array, offset: Array, axes: tuple[int, ...]) -> Array:
    """constant + slope * offset, where offset is made of x: what `two_sums` is the transpose of."""
    alike = tuple(axis for axis in axes if constant.shape[axis] == slope.shape[axis] == 1)
    pairs = None if jnp.iscomplexobj(constant) else _pairs(x, alike)
    if pairs is None:
        return _line(constant, slope, offset)
    by_pairs = functools.partial(_line_by_pairs, pairs=pairs)
    line: Array = lax.platform_dependent(constant, slope, offset, cpu=by_pairs, default=_line)
    return line


def plain_sums(first: Array, second: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The two sums as they are: for what is transposed to plain broadcasts."""
    return jnp.sum(first, axes, keepdims=True), jnp.sum(second, axes, keepdims=True)


def _both_by_pairs(
    first: Array, second: Array, axes: tuple[int, ...], pairs: tuple[int, int]
) -> tuple[Array, Array]:
    axis, size = pairs
    both = lax.complex(first, second)
    both = jnp.reshape(both, (*both.shape[:axis], both.shape[axis] // size, size, *both.shape[axis + 1 :]))
    both = jnp.sum(both, axis + 1)
    return plain_sums(lax.real(both), lax.imag(both), axes)


def _line(constant: Array, slope: Array, offset: Array) -> Array:
    return constant + slope * offset


def _line_by_pairs(constant: Array, slope: Array, offset: Array, pairs: tuple[int, int]) -> Array:
    """Step by step the transpose of `_both_by_pairs`."""
    axis, size = pairs
    short = (*offset.shape[:axis], offset.shape[axis] // size, *offset.shape[axis + 1 :])
    both = lax.complex(jnp.broadcast_to(constant, short), jnp.broadcast_to(slope, short))
    split = (*short[: axis + 1], size, *short[axis + 1 :])
    both = jnp.reshape(jnp.broadcast_to(jnp.expand_dims(both, axis + 1), split), offset.shape)
    return lax.real(both) + lax.imag(both) * offset


def _pairs(x: X, axes: tuple[int, ...]) -> tuple[int, int] | None:
    """The axis along which successive pairs are added, and how many: the most that divide its size.

    None where nothing fits or nothing is converted. Of a sharded axis XLA would gather x to take it apart,
    unless each device has whole groups of pairs: jit may have sharded any axis, and does not say so.
    """
    if x.dtype.itemsize >= 4 or any(part is not None for part in spec(x)):
        return None
    for axis in reversed(axes):
        size = x.shape[axis]
        for number in range(_MOST_PAIRS, _LEAST_PAIRS - 1, -1):
            if isinstance(size, int) and size and size % (number * jax.device_count()) == 0:
                return axis, number
    return None
