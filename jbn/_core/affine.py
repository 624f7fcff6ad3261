"""Normalization by known statistics: one factor and one constant per channel, then residual and activation.

Everything here works on arrays of x's rank: statistics and parameters are 1 along the reduced axes.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jbn._core.activation import Activation, DerivativeForm
from jbn._core.devices import Reduction
from jbn._core.dtypes import compute_dtype, reduction_dtype
from jbn._core.statistics import inverse_std
from jbn._core.types import X
from jbn._core.weights import freeze_masked, is_valid, zero_masked_overflow


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """What is static about a normalization."""

    reduction: Reduction
    epsilon: float
    dtype: np.dtype
    activation: Activation | None = None

    @property
    def derivative_form(self) -> DerivativeForm | None:
        """That of the activation."""
        return None if self.activation is None else self.activation.form


class Inputs(NamedTuple):
    """What is normalized, all of x's rank: weights, scale, bias and residual broadcast to x; None is none."""

    x: X
    weights: Array | None
    scale: Array | None
    bias: Array | None
    residual: Array | None


def normalize_with(
    config: NormConfig, inputs: Inputs, mean: Array, var: Array, delta: Array | None = None
) -> Array:
    """y by given statistics, whose mean is mean + delta: one pass, differentiable in all arguments.

    No jit of its own: a tool that traces with patches of its own, as exporters do, would leave them in it.
    """
    x, weights, scale, bias, residual = inputs
    dtype = compute_dtype(x.dtype, mean.dtype)
    offset = freeze_masked(x, weights).astype(dtype) - mean.astype(dtype)
    y = affine(offset, delta, var.astype(reduction_dtype(dtype)), scale, bias, config)
    y = zero_masked_overflow(y, weights)
    y = y if weights is None else jnp.where(is_valid(weights), y, lax.stop_gradient(y))
    return epilogue(y, residual, config.activation)


def affine(
    offset: Array,
    delta: Array | None,
    var: Float[Array, "..."],
    scale: Array | None,
    bias: Array | None,
    config: NormConfig,
) -> Array:
    """scale * (offset - delta) / sqrt(var + epsilon) + bias, with one factor and one constant per channel.

    So there are few operations per entry: in the backward pass XLA computes them again, inside other kernels,
    instead of storing the result.
    """
    parts = [part for part in (offset, delta, var, scale, bias) if part is not None]
    dtype = compute_dtype(*(part.dtype for part in parts))
    factor = inverse_std(var, config.epsilon).astype(dtype)
    if scale is not None:
        factor = factor * scale.astype(dtype)
    constant = None if bias is None else bias.astype(dtype)
    if delta is not None:
        # (offset - delta) factor + bias = offset factor + (bias - delta factor)
        constant = -delta.astype(dtype) * factor + (0 if constant is None else constant)
    y = offset.astype(dtype) * factor
    return (y if constant is None else y + constant).astype(config.dtype)


def epilogue(y: Array, residual: Array | None, activation: Activation | None) -> Array:
    """activation(y + residual), each a step of its own: the values of the separate operations."""
    if residual is not None:
        y = y + residual.astype(y.dtype)
    return y if activation is None else activation.function(y)
