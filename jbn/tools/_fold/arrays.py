"""Folding: batch norm in evaluation is a factor and an offset per channel, which the layer before can take.

This is the arithmetic, on the arrays of one layer and of its batch norm: `fold` leaves no batch norm, and
`absorb`, for layers that stay in a model, leaves one that does nothing.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array
from numpy.lib.array_utils import normalize_axis_tuple

from jbn._core.arguments import check_entries
from jbn._core.dtypes import as_numeric, compute_dtype, reduction_dtype
from jbn._core.errors import describe, error, public
from jbn._core.options import check_epsilon
from jbn._core.sharding import sharded_like
from jbn._core.statistics import inverse_std
from jbn._core.types import Axes, BatchStats, Dtype, Params
from jbn.tools._models import Layer


@public
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
    kernel, axes = _prepare(kernel, bias, params, batch_stats, epsilon, axis)
    new_kernel, new_bias = _fold(kernel, bias, params, batch_stats, float(epsilon), axes)
    bias_dtype = kernel.dtype if bias is None else jnp.asarray(bias).dtype
    return _cast(new_kernel, kernel.dtype), _cast(new_bias, bias_dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def absorb(
    layer: Mapping[str, Array], norm: Layer, epsilon: float, axis: Axes
) -> tuple[dict[str, Array], Layer]:
    """The layer with the batch norm in it, and that batch norm as the identity, which keeps what cannot go.

    The batch norm still computes (y - mean') * step + beta', where step = gamma' / sqrt(var' + epsilon) and
    var' is 1. With a scale, gamma' is sqrt(1 + epsilon), and step is 1 but for rounding, which is large in
    bfloat16. So the layer is divided by step, and both together are right in any dtype.
    """
    bias = layer.get("bias")
    kernel, axes = _prepare(layer["kernel"], bias, norm.params, norm.batch_stats, epsilon, axis)
    params, var = dict(norm.params), jnp.ones_like(norm.batch_stats["var"])
    step = inverse_std(var.astype(reduction_dtype(var.dtype, kernel.dtype)), epsilon)
    if "scale" in params:
        # step = gamma' / sqrt(1 + epsilon), where gamma' is rounded to its dtype
        params["scale"] = jnp.full_like(params["scale"], math.sqrt(1 + epsilon))
        step = multiply(step, params["scale"])
    # The fold with gamma / step for gamma, and beta / step for beta, so that (x @ kernel' + offset) * step is
    # what layer and batch norm computed:
    #   kernel' = kernel * (gamma / step) / sqrt(var + epsilon)
    #   offset (the bias'): (bias - mean) * (gamma / step) / sqrt(var + epsilon) + beta / step
    scale = norm.params.get("scale", jnp.ones_like(step))
    inner = {"scale": multiply(scale, 1 / step)}
    if "bias" in params:
        inner["bias"] = multiply(params["bias"], 1 / step)
    kernel, offset = _fold(kernel, bias, inner, norm.batch_stats, epsilon, axes)
    new_layer = {"kernel": _cast(kernel, layer["kernel"].dtype)}
    # offset = bias' - mean' + beta' / step: all in bias' if the layer has one that fits, else in beta', else
    # in mean'.
    if bias is not None:
        new_layer["bias"], offset = _split_offset(offset, bias.dtype)
    if "bias" in params:
        # beta' = offset * step; what it cannot take goes back: offset = left / step
        params["bias"], left = _split_offset(multiply(offset, step), params["bias"].dtype)
        offset = multiply(left, 1 / step)
    # mean' = -offset: as 0 - offset, for -offset would turn 0 into -0
    mean = _cast(jnp.zeros_like(offset) - offset, norm.batch_stats["mean"].dtype)
    return new_layer, Layer(params, {**norm.batch_stats, "mean": mean, "var": var})


def _prepare(
    kernel: Any, bias: Any, params: Any, batch_stats: Any, epsilon: Any, axis: Axes
) -> tuple[Array, tuple[int, ...]]:
    """The kernel as an array, and the axes of its output channels; checks that all else has the same ones."""
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
def _fold(
    kernel: Array,
    bias: Array | None,
    params: Params,
    batch_stats: BatchStats,
    epsilon: float,
    axes: tuple[int, ...],
) -> tuple[Array, Array]:
    """The new kernel and bias in the dtype in which they are computed, before they are rounded."""
    mean, var = batch_stats["mean"], batch_stats["var"]
    # The factor of each channel: gamma / sqrt(var + epsilon)
    factor = inverse_std(var.astype(reduction_dtype(var.dtype, kernel.dtype)), epsilon)
    if "scale" in params:
        factor = multiply(factor, params["scale"])
    # bias' = (bias - mean) * factor + beta
    offset = multiply(-mean if bias is None else add(bias, -mean), factor)
    if "bias" in params:
        offset = add(offset, params["bias"])
    # kernel' = kernel * factor, along the output channels
    channel_factor = jnp.expand_dims(factor, tuple(a for a in range(kernel.ndim) if a not in axes))
    return multiply(kernel, sharded_like(channel_factor, kernel)), offset


def multiply(a: Array, b: Array) -> Array:
    """The product in the common dtype, float32 or wider."""
    dtype = compute_dtype(a.dtype, b.dtype)
    return a.astype(dtype) * b.astype(dtype)


def add(a: Array, b: Array) -> Array:
    """The sum in the common dtype, float32 or wider."""
    dtype = compute_dtype(a.dtype, b.dtype)
    return a.astype(dtype) + b.astype(dtype)


def _cast(value: Array, dtype: Dtype) -> Array:
    """The value in that dtype; a complex value that would lose its imaginary part stays as it is."""
    return value if _is_too_complex(value, dtype) else value.astype(dtype)


def _split_offset(offset: Array, dtype: Dtype) -> tuple[Array, Array]:
    """What an array of this dtype takes of the offset, and what is left: all or nothing.

    A real array takes nothing of a complex offset.
    """
    nothing = jnp.zeros_like(offset)
    if _is_too_complex(offset, dtype):
        return nothing.real.astype(dtype), offset
    return offset.astype(dtype), nothing


def _is_too_complex(value: Array, dtype: Dtype) -> bool:
    """Whether the value is complex and the dtype real."""
    return jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating)
