"""Folding: batch norm in evaluation is a factor and an offset per channel, which the layer before can take.

This is the arithmetic, on the arrays of one layer; `_fold_variables` does it to a model.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array
from numpy.lib.array_utils import normalize_axis_tuple

from jbn._core.arguments import check_entries
from jbn._core.dtypes import as_numeric, compute_dtype, reduction_dtype
from jbn._core.errors import describe, error, names_errors
from jbn._core.options import check_epsilon
from jbn._core.sharding import sharded_like
from jbn._core.statistics import inverse_std
from jbn._core.types import Axes, BatchStats, Dtype, Params


@names_errors
def fold(
    kernel: Array,
    bias: Array | None,
    params: Params | None,
    batch_stats: BatchStats,
    *,
    epsilon: float = 1e-5,
    axis: Axes = -1,
) -> tuple[Array, Array]:
    """Folds batch norm in evaluation into the Dense, DenseGeneral, Conv or ConvTranspose before it.

        kernel' = kernel * factor,  bias' = (bias - mean) * factor + beta
        with factor = gamma / sqrt(var + epsilon)

    The layer with the new kernel and bias computes what the layer and the batch norm computed. `strides`,
    `padding`, `kernel_dilation` and `feature_group_count` change nothing: the output channels are the last
    axis of a kernel, in all layers but a ConvTranspose with `transpose_kernel=True`.

    - Computed in float32 or wider, and rounded once: kernel' has the dtype of kernel.
    - bias' has the dtype of bias, and without one that of kernel: the output dtype of a Flax layer follows
      from both, and stays. A complex mean or beta makes bias' complex.
    - Where var and epsilon are both 0, the factor is 0, as in `jbn.batch_norm`.

    Args:
      kernel: [..., C], or with its output channels where `axis` says.
      bias: [C], or None: the layer has none.
      params: of the batch norm: a mapping with `scale` (gamma), `bias` (beta), either or neither, each [C].
      batch_stats: of the batch norm: a mapping with `mean` and `var` (biased), each [C]; of one with
        `debias=True`, those that `jbn.tools.debias` returns.
      epsilon: that of the batch norm; Flax's default is 1e-5, and many models set another.
      axis: the axes of kernel that hold the output channels: -1, or -2 for a ConvTranspose with
        `transpose_kernel=True`, or several for a DenseGeneral with several output axes, such as (-2, -1).
        The other arrays have these axes, in the order of kernel.

    Returns:
      kernel' and bias'. Give the layer a bias if it had none.

    Raises:
      ValueError: shapes that do not fit, and arrays that are no floating or complex numbers.

    Example:
      >>> import jax.numpy as jnp, jbn.tools
      >>> kernel, bias = jnp.array([[2.0]]), jnp.array([1.0])
      >>> params = {"scale": jnp.array([0.5]), "bias": jnp.array([-1.0])}
      >>> batch_stats = {"mean": jnp.array([3.0]), "var": jnp.array([4.0])}
      >>> kernel, bias = jbn.tools.fold(kernel, bias, params, batch_stats, epsilon=0.0)
      >>> print(kernel, bias)
      [[0.5]] [-1.5]

    Reference: Jacob et al. 2018, arXiv 1712.05877, section 3.2.
    """
    kernel, bias, params, batch_stats = meta.unbox((kernel, bias, params, batch_stats))
    params = {} if params is None else params
    kernel, axes = check_fold(kernel, bias, params, batch_stats, epsilon, axis)
    new_kernel, new_bias = folded(kernel, bias, params, batch_stats, float(epsilon), axes)
    kind = kernel.dtype if bias is None else jnp.asarray(bias).dtype
    return stored(new_kernel, kernel.dtype), stored(new_bias, kind)


def check_fold(
    kernel: Any, bias: Any, params: Any, batch_stats: Any, epsilon: Any, axis: Axes
) -> tuple[Array, tuple[int, ...]]:
    """The kernel as an array and the axes of its output channels, which all other arrays have."""
    for name, value in {"kernel": kernel, "bias": kernel if bias is None else bias}.items():
        array = as_numeric(value)
        if array is None or not jnp.issubdtype(array.dtype, jnp.inexact):
            text = "a floating or complex array"
            raise error(name, describe(value), text, "Fold first, and quantize then.")
    kernel = jnp.asarray(kernel)
    try:
        axes = tuple(sorted(normalize_axis_tuple(axis, kernel.ndim)))
    except (TypeError, ValueError):
        axes = ()
    if not axes:
        raise error(
            "axis",
            repr(axis),
            f"one or several different axes of kernel = {describe(kernel)}",
            "Name those with the output channels: -1, or -2 for transpose_kernel=True.",
        )
    check_epsilon(epsilon)
    check_entries("params", params, ("scale", "bias"))
    check_entries("batch_stats", batch_stats, ("mean", "var", "count", "rows"))
    features = tuple(kernel.shape[a] for a in axes)
    named = {f"params[{name!r}]": value for name, value in params.items()}
    named |= {f"batch_stats[{name!r}]": batch_stats.get(name) for name in ("mean", "var")}
    if bias is not None:
        named["bias"] = bias
    for name, value in named.items():
        if value is None or jnp.shape(value) != features:
            raise error(
                name,
                describe(value),
                f"shape {features}, that of axis {axis} of kernel = {describe(kernel)}",
                "Set axis to where the kernel has its output channels; fold stacked layers one by one.",
            )
    return kernel, axes


@functools.partial(jax.jit, static_argnums=(4, 5), inline=True)
def folded(
    kernel: Array,
    bias: Array | None,
    params: Params,
    batch_stats: BatchStats,
    epsilon: float,
    axes: tuple[int, ...],
) -> tuple[Array, Array]:
    """`fold` before rounding."""
    mean, var = batch_stats["mean"], batch_stats["var"]
    factor = inverse_std(var.astype(reduction_dtype(var.dtype, kernel.dtype)), epsilon)
    if "scale" in params:
        factor = times(factor, params["scale"])
    offset = times(-mean if bias is None else plus(bias, -mean), factor)
    if "bias" in params:
        offset = plus(offset, params["bias"])
    spread = jnp.expand_dims(factor, tuple(a for a in range(kernel.ndim) if a not in axes))
    return times(kernel, sharded_like(spread, kernel)), offset


def times(a: Array, b: Array) -> Array:
    kind = compute_dtype(a.dtype, b.dtype)
    return a.astype(kind) * b.astype(kind)


def plus(a: Array, b: Array) -> Array:
    kind = compute_dtype(a.dtype, b.dtype)
    return a.astype(kind) + b.astype(kind)


def stored(value: Array, dtype: Dtype) -> Array:
    """The value in that dtype; a complex one stays complex."""
    widens = jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating)
    return value if widens else value.astype(dtype)
