"""Normalization by known statistics: one factor and one constant per channel, then residual and activation.

Everything here works on arrays of x's rank: statistics and parameters are 1 along the reduced axes.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jbn._core.devices import Reduction
from jbn._core.dtypes import X, wide, working
from jbn._core.shift import used
from jbn._core.statistics import inverse_deviation


@dataclasses.dataclass(frozen=True)
class Normalization:
    """What is static about a normalization."""

    reduction: Reduction
    epsilon: float
    dtype: np.dtype
    activation: str | None = None


class Inputs(NamedTuple):
    """What is normalized, all of x's rank: weights, scale, bias and residual broadcast to x; None is none."""

    x: X
    weights: Array | None
    scale: Array | None
    bias: Array | None
    residual: Array | None


def normalize_by(
    config: Normalization, inputs: Inputs, mean: Array, var: Array, rest: Array | None = None
) -> Array:
    """y by given statistics, of which the mean is mean + rest: one pass, differentiable in all arguments.

    No jit of its own: a tool that traces with patches of its own, as exporters do, would leave them in it.
    """
    x, weights, scale, bias, residual = inputs
    dtype = working(x.dtype, mean.dtype)
    offset = settled(x, weights).astype(dtype) - mean.astype(dtype)
    y = finite(affine(offset, rest, var.astype(wide(dtype)), scale, bias, config), weights)
    y = y if weights is None else jnp.where(used(weights), y, lax.stop_gradient(y))
    return finished(y, residual, config)


def affine(
    offset: Array,
    rest: Array | None,
    var: Float[Array, "..."],
    scale: Array | None,
    bias: Array | None,
    config: Normalization,
) -> Array:
    """scale * (offset - rest) / sqrt(var + epsilon) + bias, with one factor and one constant per channel.

    So there are few operations per entry: what is cheap, XLA computes again in the backward pass, inside of
    other kernels, instead of storing it.
    """
    parts = [part for part in (offset, rest, var, scale, bias) if part is not None]
    kind = working(*(part.dtype for part in parts))
    factor = inverse_deviation(var, config.epsilon).astype(kind)
    if scale is not None:
        factor = factor * scale.astype(kind)
    constant = None if bias is None else bias.astype(kind)
    if rest is not None:
        constant = -rest.astype(kind) * factor + (0 if constant is None else constant)
    y = offset.astype(kind) * factor
    return (y if constant is None else y + constant).astype(config.dtype)


def finite(y: Array, weights: Array | None) -> Array:
    """y, and 0 for entries that take no part where they would overflow."""
    return y if weights is None else jnp.where(used(weights) | jnp.isfinite(y), y, jnp.zeros_like(y))


def settled(x: X, weights: Array | None) -> X:
    """x with entries that take no part as finite constants."""
    if weights is None:
        return x
    finite = jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
    return jnp.where(used(weights), x, lax.stop_gradient(finite))


def finished(y: Array, residual: Array | None, config: Normalization) -> Array:
    """relu(y + residual), each as a step of its own: the values of the separate operations in every dtype."""
    if residual is not None:
        y = y + residual.astype(y.dtype)
    return y if config.activation is None else jax.nn.relu(y)
