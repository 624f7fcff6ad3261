"""Batch norm in float64 NumPy, written down from the paper; shares no code with `jbn`.

Weights are an array of x's shape (1 where there is no mask). Entries of weight 0 are treated as deleted:
they get y = 0 here, and the tests look only at the others.
"""

from typing import NamedTuple

import numpy as np


class Statistics(NamedTuple):
    count: np.ndarray
    mean: np.ndarray
    var: np.ndarray


class Gradients(NamedTuple):
    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


def reduced_axes(x, axis):
    features = {a % x.ndim for a in np.atleast_1d(axis)}
    return tuple(a for a in range(x.ndim) if a not in features)


def full_weights(x, axis, mask):
    """The mask, whatever its rank, as float64 of x's shape."""
    if mask is None:
        return np.ones(x.shape)
    mask = np.asarray(mask, np.float64)
    if mask.ndim < x.ndim:
        kept = reduced_axes(x, axis)[: mask.ndim]
        mask = np.expand_dims(mask, [a for a in range(x.ndim) if a not in kept])
    return np.broadcast_to(mask, x.shape)


def exact(x):
    """x in float64 or complex128."""
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def statistics(x, axis, mask=None):
    """Count, mean and biased variance per channel, keeping reduced axes as 1."""
    axes, weights = reduced_axes(x, axis), full_weights(x, axis, mask)
    x = np.where(weights > 0, exact(x), 0)
    count = weights.sum(axes, keepdims=True)
    divisor = np.where(count > 0, count, 1)
    mean = (weights * x).sum(axes, keepdims=True) / divisor
    var = (weights * np.abs(x - mean) ** 2).sum(axes, keepdims=True) / divisor
    return Statistics(count, mean, var)


def normalize(x, axis, scale, bias, epsilon, mask=None):
    """y in training; scale and bias are [C] or None."""
    stats = statistics(x, axis, mask)
    return apply(x, axis, stats.mean, stats.var, scale, bias, epsilon, mask)


def apply(x, axis, mean, var, scale, bias, epsilon, mask=None):
    """y by given statistics, which keep reduced axes as 1."""
    axes = reduced_axes(x, axis)
    y = (np.where(full_weights(x, axis, mask) > 0, exact(x), 0) - mean) / np.sqrt(var + epsilon)
    y = y if scale is None else y * np.expand_dims(exact(scale), axes)
    y = y if bias is None else y + np.expand_dims(exact(bias), axes)
    return np.where(full_weights(x, axis, mask) > 0, y, 0)


def gradients(x, axis, scale, epsilon, cotangent, mask=None):
    """Of sum(cotangent * y) in training, for real x, over the entries that take part.

    dx = a (g - w (sum g + offset r^2 sum(g offset)) / n), with r = 1 / sqrt(var + epsilon), a = scale r.
    """
    axes, weights = reduced_axes(x, axis), full_weights(x, axis, mask)
    count, mean, var = statistics(x, axis, mask)
    used = weights > 0
    g = np.where(used, exact(cotangent), 0)
    offset = (
        np.where(used, exact(x) - mean, 0)
        if mask is None
        else np.where(used, np.where(used, exact(x), 0) - mean, 0)
    )
    r = 1 / np.sqrt(var + epsilon)
    a = r if scale is None else r * np.expand_dims(exact(scale), axes)
    total = g.sum(axes, keepdims=True)
    moment = (g * offset).sum(axes, keepdims=True)
    n = np.where(count > 0, count, 1)
    dx = a * (g - weights * (total + offset * r**2 * moment) / n)
    return Gradients(np.where(used, dx, 0), (moment * r).squeeze(axes), total.squeeze(axes))


def running(old, batch, momentum):
    """The update rule."""
    return momentum * exact(old) + (1 - momentum) * batch
