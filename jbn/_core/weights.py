"""Masks and weights: which entries take part in the statistics, and how much they count.

Weights are bool, or numbers from 0 up, of x's rank; None is an entry of weight 1 everywhere. Entries with
False or 0 take no part, whatever they hold.
"""

from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from jbn._core.sharding import sharded_like
from jbn._core.types import X

# What is known while tracing stays a number: the compiler would need time to find that an array is constant.
Count: TypeAlias = Array | np.floating[Any]


def is_valid(weights: Array) -> Bool[Array, "..."]:
    """Which entries take part."""
    return weights if weights.dtype == bool else weights > 0


def zero_masked(values: Array, weights: Array | None) -> Array:
    """The values, and 0 for entries that take no part."""
    return values if weights is None else jnp.where(is_valid(weights), values, jnp.zeros_like(values))


def apply_weights(values: Array, weights: Array | None) -> Array:
    """Weight times value; values of entries that take no part are 0 already."""
    if weights is not None and weights.dtype != bool:
        values = values * zero_masked(weights.astype(values.real.dtype), weights).astype(values.dtype)
    return values


def freeze_masked(x: X, weights: Array | None) -> X:
    """x with entries that take no part as finite constants: without gradients, and 0 for NaN and inf."""
    if weights is None:
        return x
    constants = lax.stop_gradient(jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)))
    return jnp.where(is_valid(weights), x, constants)


def zero_masked_overflow(y: Array, weights: Array | None) -> Array:
    """y, and 0 for entries that take no part where they overflow."""
    if weights is None:
        return y
    return jnp.where(is_valid(weights) | jnp.isfinite(y), y, jnp.zeros_like(y))


def divide_by_count(sums: Array, count: Count) -> Array:
    """Sums over rows, or several such stacked, divided by the number or the total weight of the rows."""
    if isinstance(count, np.floating):  # 0 or at least 1, being a number of rows
        return jnp.divide(sums, max(count, count.dtype.type(1)).astype(sums.dtype))
    divisor = safe_count(count).astype(sums.dtype)
    if divisor.ndim < sums.ndim:
        return jnp.divide(sums, divisor[None])
    return jnp.divide(sums, sharded_like(jnp.broadcast_to(divisor, sums.shape), sums))


def safe_count(count: Array) -> Array:
    """The count as a divisor: sums over no rows are 0 and stay 0."""
    return jnp.where(count > 0, count, jnp.ones_like(count))
