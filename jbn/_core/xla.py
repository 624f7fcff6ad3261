"""All that is there for the compiler alone: forms of the same values that XLA makes into less traffic.

What each form wins is counted in benchmarks/NOTES.md. Nothing else in the package names a platform or asks
how many devices there are. The order of summation, and so the last digits of statistics of 16-bit arrays on
a CPU, depends on that number.
"""

import enum
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jbn._core.sharding import partition_spec
from jbn._core.types import X
from jbn._core.weights import apply_weights

S = TypeVar("S")
T = TypeVar("T")

# Of more than the most, XLA makes a loop that is not vectorized; of fewer than the least, too much is stored.
_MOST_SUMMED_FIRST, _LEAST_SUMMED_FIRST = 16, 4

_HINT_PLATFORM, _STORING_PLATFORM = "tpu", "cpu"


class DifferenceUse(enum.Enum):
    """What x - shift is for: as many axes of size 1 make each use another expression to XLA.

    If one sum alone uses it, XLA for CPUs computes it inside that sum. If something else uses it too, XLA
    stores it first: a pass to write, and one to read for each use. Two sums of f32 take 9.8 ms, not 15.9.
    """

    ENTRIES = 0
    MEAN = 1
    VARIANCE = 2
    GRADIENT = 3


def difference(x: X, shift: Array, use: DifferenceUse) -> Array:
    """x - shift in the dtype of the shift, as an expression that no other use shares."""
    front = tuple(range(use.value))
    offset = jnp.expand_dims(x, front).astype(shift.dtype) - jnp.expand_dims(shift, front)
    return lax.squeeze(offset, front)


def sum_pair(
    x: X, first: Array, second: Array, weights: Array | None, axes: tuple[int, ...]
) -> tuple[Array, Array]:
    """The weighted sums of two arrays that are made of x, over axes that are kept with size 1.

    XLA for CPUs computes a sum together with what it alone uses. What two sums use, it stores first, and of
    values of 16 bits that is their conversion: 4 bytes to write for each 2 of x. A sum of complex numbers
    over a short axis is one loop that reads each value once and makes both sums, so there groups of numbers
    are added first: 1.5 ms instead of 9.4 for bf16 [25088, 256].
    """
    first, second = apply_weights(first, weights), apply_weights(second, weights)
    both = functools.partial(plain_sum_pair, axes=axes)
    groups = _summation_chunk(x, axes)
    if groups is None:
        return both(first, second)
    as_complex = functools.partial(_complex_sum_pair, axes=axes, groups=groups)
    sums: tuple[Array, Array] = lax.platform_dependent(first, second, cpu=as_complex, default=both)
    return sums


def plain_sum_pair(first: Array, second: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The two sums as they are: for what is transposed to plain broadcasts."""
    return jnp.sum(first, axes, keepdims=True), jnp.sum(second, axes, keepdims=True)


def broadcast_affine(x: X, constant: Array, slope: Array, offset: Array, axes: tuple[int, ...]) -> Array:
    """constant + slope * offset, where offset is made of x: what `sum_pair` is the transpose of."""
    alike = tuple(axis for axis in axes if constant.shape[axis] == slope.shape[axis] == 1)
    groups = None if jnp.iscomplexobj(constant) else _summation_chunk(x, alike)
    if groups is None:
        return _plain_affine(constant, slope, offset)
    as_complex = functools.partial(_complex_affine, groups=groups)
    result: Array = lax.platform_dependent(constant, slope, offset, cpu=as_complex, default=_plain_affine)
    return result


def _complex_sum_pair(
    first: Array, second: Array, axes: tuple[int, ...], groups: tuple[int, int]
) -> tuple[Array, Array]:
    """Real and imaginary part of a sum of complex numbers: first of each group, then of the groups."""
    axis, size = groups
    both = lax.complex(first, second)
    both = jnp.reshape(both, (*both.shape[:axis], both.shape[axis] // size, size, *both.shape[axis + 1 :]))
    both = jnp.sum(both, axis + 1)
    return plain_sum_pair(lax.real(both), lax.imag(both), axes)


def _plain_affine(constant: Array, slope: Array, offset: Array) -> Array:
    return constant + slope * offset


def _complex_affine(constant: Array, slope: Array, offset: Array, groups: tuple[int, int]) -> Array:
    """Step by step the transpose of `_complex_sum_pair`."""
    axis, size = groups
    short = (*offset.shape[:axis], offset.shape[axis] // size, *offset.shape[axis + 1 :])
    both = lax.complex(jnp.broadcast_to(constant, short), jnp.broadcast_to(slope, short))
    split = (*short[: axis + 1], size, *short[axis + 1 :])
    both = jnp.reshape(jnp.broadcast_to(jnp.expand_dims(both, axis + 1), split), offset.shape)
    return lax.real(both) + lax.imag(both) * offset


def _summation_chunk(x: X, axes: tuple[int, ...]) -> tuple[int, int] | None:
    """The axis along which successive entries are added first, and how many: the most that divide its size.

    None where nothing fits or nothing is converted. Of a sharded axis XLA would gather x to take it apart,
    unless each device has whole groups: jit may have sharded any axis, and does not say so.
    """
    if x.dtype.itemsize >= 4 or any(names is not None for names in partition_spec(x)):
        return None
    for axis in reversed(axes):
        size = x.shape[axis]
        for number in range(_MOST_SUMMED_FIRST, _LEAST_SUMMED_FIRST - 1, -1):
            if isinstance(size, int) and size and size % (number * jax.device_count()) == 0:
                return axis, number
    return None


def with_hint_on_tpu(with_hint: Callable[[], T], without: Callable[[], T]) -> T:
    """`with_hint()` on TPUs, `without()` elsewhere; both give the same values, to rounding.

    XLA for TPUs sums inside of the convolution that makes x, which it cannot as long as the sums wait for
    rows of x: 47.6 GB instead of 53.3 in a ResNet-50 step. Elsewhere rows cost nothing, and XLA for GPUs
    would always make the second pass that a hint far from the data needs.
    """
    chosen: T = lax.platform_dependent(**{_HINT_PLATFORM: with_hint}, default=without)
    return chosen


def unless_on_cpu(function: Callable[[S], T], here: S, on_cpu: S) -> T:
    """`function(here)`, and `function(on_cpu)` on CPUs; both give the same values, to rounding.

    Where memory is slow beside arithmetic, it pays to compute the derivative of an activation three times.
    On a CPU that takes two to three times as long as the activation outside of the layer.
    """
    stored = {_STORING_PLATFORM: functools.partial(function, on_cpu)}
    chosen: T = lax.platform_dependent(**stored, default=functools.partial(function, here))
    return chosen


def in_order_of_gradients(inputs: Mapping[str, Any], x: X) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs of a jitted function as two arguments, of which the first has the first gradient.

    That decides which sums XLA for GPUs puts into one kernel where two layers share a gradient: 1 % of a
    ResNet-50's traffic, for either dtype.
    """
    first = "x" if x.dtype.itemsize < 4 else "scale"
    return {first: inputs[first]}, {name: value for name, value in inputs.items() if name != first}


def both_where_positive(y: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """Both, and 0 where y is not positive, each by a condition of its own: XLA would store one for both.

    Three passes that the derivative of relu inside of the layer does not make.
    """
    first = jnp.where(y <= 0, jnp.zeros_like(first), first)
    return first, jnp.where(y > 0, second, jnp.zeros_like(second))


@jax.custom_jvp
def gelu(y: Array) -> Array:
    """GELU by a tanh, y (1 + tanh(u)) / 2, as y logistic(2 u): XLA for GPUs repeats a logistic, but no tanh.

    8 passes instead of 10 and 16, in float32 and bfloat16, forward and backward. Far below 0 it keeps the
    digits that 1 + tanh(u) loses. u = sqrt(2 / pi) (y + 0.044715 y^3).

    Reference: Hendrycks and Gimpel 2016, arXiv 1606.08415.
    """
    return y * _gate(y)[0]


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """y_dot (gate + y gate'), where gate' = gate (1 - gate) (2 u)'.

    1 - gate as logistic(-2 u) would keep more digits in 16 bits, where f' is off by up to 0.03 (JAX's: 0.02),
    but is a second logistic: two passes more.
    """
    (y,), (y_dot,) = primals, tangents
    gate, slope = _gate(y)
    return y * gate, y_dot * (gate + gate * (1 - gate) * y * slope)


def _gate(y: Array) -> tuple[Array, Array]:
    """logistic(2 u), and the derivative of 2 u."""
    linear, cubic = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715
    return lax.logistic(y * (linear + cubic * (y * y))), linear + 3 * cubic * (y * y)


def read_again(y: Array) -> Array:
    """y from memory, where it is in any case: XLA would compute it again from x and residual, two reads."""
    stored: Array = lax.optimization_barrier(y)
    return stored


def zero_masked_apart(values: Array, weights: Array | None) -> Array:
    """`zero_masked` by a condition that XLA does not see to be the same: it would store one for both.

    Two passes of float32, where a cotangent under a mask goes into sums and into dx.
    """
    if weights is None:
        return values
    sign = jnp.sign(weights.astype(np.int8) if weights.dtype == bool else weights)
    return jnp.where(sign > 0, values, jnp.zeros_like(values))
