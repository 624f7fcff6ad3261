"""The moments of a batch: measured on one device, merged exactly over many.

The one hard thing about batch norm in float32 is that a mean of 1e4 leaves no digits for a variance of 1.
So a mean is carried as two numbers, `shift + rest`: the shift lies near the data and is subtracted from x
first, which is exact or nearly so, and the rest is small and keeps all its digits.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from jbn._checks import check_axis_name, check_bound, check_mask, check_x, error
from jbn._types import Axes, AxisIndexGroups, AxisName, X, describe, spec, wide

# The rows whose mean is the shift. One row would do, but then (shift - mean)^2 is of the size of the
# variance, in the worst of many channels ten times it, and as many times larger is the error of
# E[(x - shift)^2] - (mean - shift)^2. The mean of 32 rows makes that factor at most about 1.3.
_SHIFT_ROWS = 32

# Up to so many devices one collective carries a table of every device's moments, which is then merged
# exactly. Beyond, its bytes would grow with the devices, and two collectives of constant size take over.
_TABLE_DEVICES = 8


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Moments:
    """Count, mean and biased variance of rows, per channel: a frozen pytree.

    Attributes:
      count: f32[C], the number of rows, or the sum of their weights.
      mean: f32[C] (complex for complex rows), their mean; 0 where count is 0.
      var: f32[C], their biased variance `E[|x - mean|^2]`; 0 where count is 0.

    Example:
      >>> import jax.numpy as jnp, jbn
      >>> jbn.moments(jnp.array([[1.0], [3.0]]))
      Moments(count=Array([2.], dtype=float32), mean=Array([2.], dtype=float32), var=Array([1.], dtype=float32))
    """

    count: Float[Array, "*C"]
    mean: Num[Array, "*C"]
    var: Float[Array, "*C"]


class Measured(NamedTuple):
    """Moments as the core keeps them: of x's rank, 1 along the reduced axes, and the mean in two parts.

    `values` is the number of entries with a weight above 0. It differs from `count`, the sum of weights,
    only for fractional weights, and decides whether a batch has a variance at all.
    """

    count: Float[Array, "..."]
    values: Float[Array, "..."]
    shift: Num[Array, "..."]
    rest: Num[Array, "..."]
    var: Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What statistics are taken over: axes of x, and devices. Static and hashable."""

    axes: tuple[int, ...]
    axis_name: AxisName | None = None
    groups: tuple[tuple[int, ...], ...] | None = None

    def devices(self) -> int:
        """How many devices take part in one batch."""
        if self.axis_name is None:
            return 1
        return len(self.groups[0]) if self.groups else int(lax.psum(1, self.axis_name))

    def psum(self, value: Array) -> Array:
        """The sum over the devices of one batch."""
        return self._collective(lambda name, **groups: lax.psum(value, name, **groups))

    def pmean(self, value: Array) -> Array:
        """The mean over the devices of one batch."""
        return value if self.axis_name is None else self._collective(
            lambda name, **groups: lax.pmean(value, name, **groups)
        )

    def pmax(self, value: Array) -> Array:
        """The maximum over the devices of one batch."""
        return self._collective(lambda name, **groups: lax.pmax(value, name, **groups))

    def index(self) -> Array:
        """This device's place among the devices of its batch."""
        index = lax.axis_index(self.axis_name)
        if self.groups is None:
            return index
        places = {device: place for group in self.groups for place, device in enumerate(group)}
        return jnp.asarray([places[device] for device in sorted(places)], np.int32)[index]

    def _collective(self, operation: Callable[..., Array]) -> Array:
        """The operation with axis name and groups; what JAX cannot do is said with the way out."""
        groups = {} if self.groups is None else {"axis_index_groups": self.groups}
        try:
            return operation(self.axis_name, **groups)
        except NotImplementedError:
            raise error(
                "moments",
                "axis_index_groups",
                f"{self.groups!r} under vmap, or under shard_map with check_vma=True",
                "None there, where JAX cannot group devices",
                "Split the axis in two, for example a mesh of shape (groups, devices per group), and pass the "
                "name of the second as axis_name.",
            ) from None


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
    return _over_devices(local, reduction)


def _measure_complex(x: X, weights: Array | None, reduction: Reduction) -> Measured:
    """Real and imaginary parts side by side along a new first axis: one reduction serves both."""
    parts = jnp.stack([lax.real(x), lax.imag(x)])
    weights = None if weights is None else weights[None]
    moved = dataclasses.replace(reduction, axes=tuple(axis + 1 for axis in reduction.axes))
    count, values, shift, rest, var = measure(parts, weights, moved)
    count, values = (jnp.broadcast_to(n, var.shape)[0] for n in (count, values))
    return Measured(
        count, values, lax.complex(shift[0], shift[1]), lax.complex(rest[0], rest[1]), var[0] + var[1]
    )


def _measure_local(x: X, weights: Array | None, axes: tuple[int, ...]) -> Measured:
    shift = lax.stop_gradient(_shift(x, weights, axes))
    offset = centre(x, shift, weights)
    count, values = _counts(x, weights, axes, shift.dtype)
    total = _or_one(count)
    rest = _weighted_sum(offset, weights, axes) / total
    var = _weighted_sum(offset * offset, weights, axes) / total - rest * rest
    return Measured(*(jnp.broadcast_to(n, shift.shape) for n in (count, values)), shift, rest, _not_negative(var))


def used(weights: Array) -> Bool[Array, "..."]:
    """Which entries take part."""
    return weights if weights.dtype == bool else weights > 0


def centre(x: X, shift: Array, weights: Array | None) -> Array:
    """x - shift, and 0 for entries that take no part."""
    offset = x.astype(shift.dtype) - shift
    return offset if weights is None else jnp.where(used(weights), offset, jnp.zeros_like(offset))


def _shift(x: X, weights: Array | None, axes: tuple[int, ...]) -> Array:
    """A constant near the data, per channel: the mean of the first rows, or of all rows.

    The first n of N examples bound (shift - mean)^2 by N/n times the variance, so that however far out they
    lie, the relative error of the variance stays below N/n times that of a sum. All rows, at the price of
    one more pass, are taken where the first cannot be: under a mask they may be padding, and a dimension
    that is sharded over an explicit mesh axis cannot be cut.
    """
    dtype = wide(x.dtype)
    if not all(x.shape[axis] for axis in axes):
        return jnp.zeros([1 if axis in axes else size for axis, size in enumerate(x.shape)], dtype)
    if weights is None:
        rows = _first_rows(x, axes).astype(dtype)
        low, mean, high = (f(rows, axes, keepdims=True) for f in (jnp.min, jnp.mean, jnp.max))
        return jnp.clip(mean, low, high)
    taken, rows = used(weights), x.astype(dtype)
    low = jnp.min(jnp.where(taken, rows, jnp.full_like(rows, jnp.inf)), axes, keepdims=True)
    high = jnp.max(jnp.where(taken, rows, jnp.full_like(rows, -jnp.inf)), axes, keepdims=True)
    zeroed = jnp.where(taken, rows, jnp.zeros_like(rows))
    mean = _weighted_sum(zeroed, weights, axes) / _or_one(_counts(x, weights, axes, dtype)[0])
    return jnp.where(low > high, jnp.zeros_like(mean), jnp.clip(mean, low, high))


def _first_rows(x: X, axes: tuple[int, ...]) -> X:
    """As many leading examples as hold `_SHIFT_ROWS` rows, cut before any conversion of dtype."""
    example, *others = axes if axes else (None,)
    if example is None or spec(x)[example] is not None:
        return x
    rows_per_example = int(np.prod([x.shape[axis] for axis in others]))
    examples = min(x.shape[example], -(-_SHIFT_ROWS // rows_per_example))
    return lax.slice_in_dim(x, 0, examples, axis=example)


def _counts(x: X, weights: Array | None, axes: tuple[int, ...], dtype: np.dtype) -> tuple[Array, Array]:
    """Sum of weights and number of entries that take part, with x's rank."""
    if weights is None:
        rows = jnp.full([1] * x.ndim, np.prod([x.shape[axis] for axis in axes]), dtype)
        return rows, rows
    # The mask may be 1 along an axis of x: each of its entries then stands for as many of x.
    repeats = np.asarray(np.prod([x.shape[axis] // max(1, weights.shape[axis]) for axis in axes]), dtype)
    values = repeats * jnp.sum(used(weights), axes, dtype=dtype, keepdims=True)
    if weights.dtype == bool:
        return values, values
    return repeats * jnp.sum(_used_weights(weights, dtype), axes, keepdims=True), values


def _used_weights(weights: Array, dtype: np.dtype) -> Array:
    return jnp.where(used(weights), weights.astype(dtype), jnp.zeros_like(weights, dtype))


def _weighted_sum(values: Array, weights: Array | None, axes: tuple[int, ...]) -> Array:
    """Sum of weight times value; values of entries that take no part are 0 already."""
    if weights is not None and weights.dtype != bool:
        values = values * _used_weights(weights, values.real.dtype)
    return jnp.sum(values, axes, keepdims=True)


def expectations(
    values: list[Array], weights: Array | None, count: Array, reduction: Reduction
) -> list[Array]:
    """The mean of each of several arrays over rows and devices, in one collective.

    `count` is that of `measure`, over all devices; where it is 0 the mean is 0.
    """
    sums = jnp.stack([_weighted_sum(value, weights, reduction.axes) for value in values])
    per_device = _or_one(count) / np.asarray(reduction.devices(), count.dtype)
    return list(reduction.pmean(sums) / per_device[None].astype(sums.dtype))


def _over_devices(local: Measured, reduction: Reduction) -> Measured:
    """The moments of the rows of all devices, the same on each of them."""
    devices = reduction.devices()
    if devices > _TABLE_DEVICES:
        return _over_many_devices(local, reduction)
    rows = jnp.stack(local)
    here = jnp.arange(devices, dtype=np.int32) == reduction.index()
    table = jnp.where(jnp.expand_dims(here, range(1, rows.ndim + 1)), rows, jnp.zeros_like(rows))
    return _merge(Measured(*jnp.moveaxis(reduction.psum(table), 1, 0)))


def _over_many_devices(local: Measured, reduction: Reduction) -> Measured:
    """Two collectives of constant size: a shift common to all, then the sums about it.

    The common shift is the largest of the devices' means: like theirs, it leaves a constant channel exact.
    """
    count, values, shift, rest, var = local
    lowest = jnp.full_like(shift, -jnp.inf)
    common = reduction.pmax(lax.stop_gradient(jnp.where(count > 0, shift + rest, lowest)))
    common = jnp.where(common == lowest, jnp.zeros_like(common), common)
    offset = jnp.where(count > 0, (shift - common) + rest, jnp.zeros_like(rest))
    sums = jnp.stack([count, values, count * offset, count * (var + offset * offset)])
    count, values, first, second = reduction.psum(sums)
    rest, square = first / _or_one(count), second / _or_one(count)
    return Measured(count, values, common, rest, _not_negative(square - rest * rest))


def _merge(parts: Measured) -> Measured:
    """Moments along a first axis into one, as if all rows had come in one batch.

    var = sum of weight * (var_i + (mean_i - mean)^2): the spread of the means belongs to the variance.
    """
    count, values, shift, rest, var = parts
    total, some = jnp.sum(count, 0), count > 0
    first = jnp.expand_dims(jnp.argmax(some, 0), 0)
    common = jnp.where(jnp.any(some, 0), jnp.take_along_axis(shift, first, 0)[0], jnp.zeros_like(shift[0]))
    common = lax.stop_gradient(common)
    offset = jnp.where(some, (shift - common[None]) + rest, jnp.zeros_like(rest))
    share = count / _or_one(total)[None]
    mean = jnp.sum(share * offset, 0)
    spread = jnp.where(some, var, jnp.zeros_like(var)) + square(offset - mean[None])
    return Measured(total, jnp.sum(values, 0), common, mean, jnp.sum(share * spread, 0))


def square(x: Array) -> Array:
    """|x|^2, real."""
    return lax.real(x) ** 2 + lax.imag(x) ** 2 if jnp.iscomplexobj(x) else x * x


def _or_one(count: Array) -> Array:
    """The count as a divisor: sums over no rows are 0 and stay 0."""
    return jnp.where(count > 0, count, jnp.ones_like(count))


def _not_negative(var: Array) -> Array:
    """Round-off below 0 is cut off; the derivative, which has none, is left alone, and NaN stays NaN."""
    return var + lax.stop_gradient(jnp.where(var < 0, -var, jnp.zeros_like(var)))


def to_moments(measured: Measured, axes: tuple[int, ...]) -> Moments:
    """The public form: one value per channel, and the mean in one piece."""
    count, _, shift, rest, var = (lax.squeeze(part, axes) for part in measured)
    return Moments(count, shift + rest, var)


def moments(
    x: X,
    *,
    axis: Axes = -1,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    mask: Array | None = None,
) -> Moments:
    """Count, mean and biased variance of x per channel, over every other axis and over devices.

        mean = E[x],  var = E[|x - mean|^2]

    Reduced in float32 or wider, in one pass about a shift near the data, so that N(1e4, 1) has variance 1
    (to 1e-5) and a constant channel exactly 0. Differentiable to any order.

    Args:
      x: any shape, any numeric dtype.
      axis: the feature axis or axes.
      axis_name: mapped axes (of `vmap`, `pmap`, `shard_map`) whose rows count too.
      axis_index_groups: groups of devices along the axis that count together.
      mask: bool, or weights from 0 up: x's rank and broadcastable to x, or aligned with x's leading
        non-feature axes (`[N]`, `[N, T]`). Entries with 0 or False take no part, whatever they hold.

    Returns:
      `Moments`, one value per channel; of no rows: count, mean and var 0.

    Raises:
      ValueError: an axis, a mask or groups that do not fit x.
      NameError: an axis name that nothing binds.

    Example:
      >>> import jax.numpy as jnp, jbn
      >>> x = jnp.array([[1.0, 5.0], [2.0, 5.0], [9.0, 9.0]])
      >>> m = jbn.moments(x, mask=jnp.array([True, True, False]))
      >>> print(m.count, m.mean, m.var)
      [2. 2.] [1.5 5. ] [0.25 0.  ]

    Reference: Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983 (shifted data).
    """
    x, axes = check_x("moments", x, axis)
    axis_name, groups = check_axis_name("moments", axis_name, axis_index_groups)
    check_bound("moments", axis_name)
    weights = None if mask is None else check_mask("moments", mask, x, axes)
    return to_moments(measure(x, weights, Reduction(axes, axis_name, groups)), axes)


def merge(*moments: Moments) -> Moments:
    """The moments of all rows together, as if they had come in one batch.

        mean = sum(n_i mean_i) / n,  var = sum(n_i (var_i + (mean_i - mean)^2)) / n,  n = sum(n_i)

    Exact for unequal counts, associative and commutative to rounding; count 0 is the identity.

    Args:
      *moments: one or more, of the same shape.

    Returns:
      `Moments` of the same shape; var is biased.

    Raises:
      ValueError: no moments at all, or of different shapes.

    Example:
      >>> import jax.numpy as jnp, jbn
      >>> first, second = jnp.array([0.0, 1, 2, 3])[:, None], jnp.array([10.0, 12])[:, None]
      >>> m = jbn.merge(jbn.moments(first), jbn.moments(second))
      >>> print(m.mean, m.var)
      [4.6666665] [21.222221]

    Reference: Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983.
    """
    if not moments or any(not isinstance(m, Moments) or m.mean.shape != moments[0].mean.shape for m in moments):
        raise error(
            "merge",
            "moments",
            f"({', '.join(describe(getattr(m, 'mean', m)) for m in moments)})",
            "one or more jbn.Moments of one shape",
            "Merge the moments of one layer, as from jbn.moments(x).",
        )
    count, mean, var = (jnp.stack([getattr(m, name) for m in moments]) for name in ("count", "mean", "var"))
    merged = _merge(Measured(count, count, mean, jnp.zeros_like(mean), var))
    return Moments(merged.count, merged.shift + merged.rest, merged.var)
