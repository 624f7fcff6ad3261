"""Moments of a batch, as users see them: measured, and merged as if all rows had come in one batch."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from jbn._core.arguments import axis_size, prepare_mask, prepare_x
from jbn._core.devices import Reduction
from jbn._core.dtypes import unwrapped
from jbn._core.errors import describe, error, join_names, public
from jbn._core.options import prepare_axis_name
from jbn._core.statistics import ShiftedMoments, measure, merge_shifted
from jbn._core.types import Axes, AxisIndexGroups, AxisName, X


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and biased variance of rows, per channel: a frozen pytree.

    Attributes:
      count: f32[C], the number of rows, or the sum of their weights.
      mean: f32[C] (complex for complex rows), their mean; 0 where count is 0.
      var: f32[C], their biased variance `E[|x - mean|^2]`; 0 where count is 0.

    Example:
      >>> import jax.numpy as jnp, jbn
      >>> m = jbn.moments(jnp.array([[1.0], [3.0]]))
      >>> print(m.count, m.mean, m.var)
      [2.] [2.] [1.]
    """

    count: Float[Array, "*C"]
    mean: Num[Array, "*C"]
    var: Float[Array, "*C"]


# Outside of jit, one compiled call and not a hundred. Inside of a mapped axis there is a jit already.
_compiled_measure = jax.jit(measure, static_argnums=2, inline=True)


@functools.partial(jax.jit, static_argnums=1)  # of layers that are alike, one is traced
def to_moments(measured: ShiftedMoments, axes: tuple[int, ...]) -> Moments:
    """The public form: one value per channel, and the mean in one piece."""
    weight, _, shift, delta, var = (lax.squeeze(part, axes) for part in measured)
    return Moments(weight, shift + delta, var)


@public
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
      `Moments`, one value per channel; without rows, count, mean and var are 0.

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
    x, axes = prepare_x(x, axis)
    axis_name, groups = prepare_axis_name(axis_name, axis_index_groups)
    size = axis_size(axis_name, groups)
    weights = None if mask is None else prepare_mask(mask, x, axes)
    run = _compiled_measure if axis_name is None else measure
    found: Moments = to_moments(run(x, weights, Reduction(axes, axis_name, groups, size)), axes)
    return found


@public
def merge(*moments: Moments) -> Moments:
    """The moments of all rows together, as if they had come in one batch.

        mean = sum(n_i mean_i) / n,  var = sum(n_i (var_i + (mean_i - mean)^2)) / n,  n = sum(n_i)

    Exact for unequal counts; associative and commutative up to rounding; moments with count 0 change nothing.

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
      >>> print(f"{m.mean[0]:.4f} {m.var[0]:.4f}")
      4.6667 21.2222

    Reference: Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983.
    """
    return checked_merge(moments)


def checked_merge(moments: Sequence[Moments]) -> Moments:
    """`merge`, whose errors have no name yet: for layers and tools."""
    moments = unwrapped(moments)
    if not moments or any(
        not isinstance(m, Moments) or m.mean.shape != moments[0].mean.shape for m in moments
    ):
        raise error(
            "moments",
            f"({join_names(describe(getattr(m, 'mean', m)) for m in moments)})",
            "one or more jbn.Moments of one shape",
            how_to_have_moments(moments, "Merge the moments of one layer, as from jbn.moments(x)."),
        )
    return merge_all(moments)


def how_to_have_moments(given: Iterable[Any], otherwise: str) -> str:
    """The end of an error about what came as moments."""
    if any(isinstance(each, Mapping) and set(each) == {"count", "mean", "var"} for each in given):
        return "A checkpoint may give a mapping back: jbn.Moments(**found)."
    return otherwise


def merge_all(moments: Sequence[Moments]) -> Moments:
    """`merge` of moments that fit together."""
    with jax.numpy_dtype_promotion("standard"):  # real and complex moments have a common dtype, always
        return merge_stacked(jax.tree.map(lambda *parts: jnp.stack(parts), *moments))


def merge_stacked(moments: Moments) -> Moments:
    """`merge` of moments along a first axis, which may be sharded."""
    count, mean, var = moments.count, moments.mean, moments.var
    parts = ShiftedMoments(count, count, mean, jnp.zeros_like(mean), var)
    merged: Moments = to_moments(merge_shifted(parts), ())
    return merged
