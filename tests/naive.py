"""Every option of batch norm in a few lines of float64 each, with JAX's own derivatives: slow, plain to read.

Statistics of a group of examples are written down as the papers have them. Nothing is shared with `jbn`.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax


def batch_norm(params, batch_stats, x, residual, *, axis, weights, epsilon, options, evaluating):
    """y in float64 and the new statistics; `weights` has x's shape, or is None."""
    features = {a % x.ndim for a in np.atleast_1d(axis)}
    axes = tuple(a for a in range(x.ndim) if a not in features)
    weights = np.ones(x.shape) if weights is None else np.asarray(weights, np.float64)
    known = _known(batch_stats, options)
    expand = lambda value: jnp.expand_dims(jnp.asarray(value, jnp.float64), axes)  # noqa: E731
    x = jnp.where(weights > 0, x, lax.stop_gradient(x))
    if evaluating:
        x_hat = (x - expand(known["mean"])) / jnp.sqrt(expand(known["var"]) + epsilon)
        new = batch_stats
    else:
        size = options.get("virtual_batch_size") or x.shape[axes[0]]
        groups = np.split(np.arange(x.shape[axes[0]]), x.shape[axes[0]] // size)
        parts = [(jnp.take(x, g, axes[0]), np.take(weights, g, axes[0])) for g in groups]
        x_hat = jnp.concatenate(
            [_hat(*part, axes, epsilon, options.get("renorm"), known, expand) for part in parts], axes[0]
        )
        new = _remembered(batch_stats, x, weights, axes, options)
    y = x_hat
    if "scale" in params:
        y = y * expand(params["scale"])
    if "bias" in params:
        y = y + expand(params["bias"])
    y = jnp.where(weights > 0, y, lax.stop_gradient(y))
    if residual is not None:
        y = y + residual
    if options.get("activation"):
        y = jnp.where(y > 0, y, 0.0)
    return y, lax.stop_gradient(new)


def _moments(x, weights, axes):
    count = np.sum(weights, axes, keepdims=True)
    divisor = np.where(count > 0, count, 1)
    mean = jnp.sum(weights * x, axes, keepdims=True) / divisor
    var = jnp.sum(weights * (x - mean) ** 2, axes, keepdims=True) / divisor
    return count, mean, var


def _hat(x, weights, axes, epsilon, renorm, known, expand):
    _, mean, var = _moments(x, weights, axes)
    some = np.sum(weights > 0, axes, keepdims=True) > 1
    sigma_batch = jnp.sqrt(jnp.where(some, var, 1.0) + epsilon)
    x_hat = jnp.where(some, (x - mean) / sigma_batch, 0.0)
    if renorm is None:
        return x_hat
    sigma = jnp.sqrt(expand(known["var"]) + epsilon)
    r = jnp.clip(sigma_batch / sigma, 1 / renorm.r_max, renorm.r_max)
    d = jnp.clip((mean - expand(known["mean"])) / sigma, -renorm.d_max, renorm.d_max)
    return jnp.where(some, x_hat * lax.stop_gradient(r) + lax.stop_gradient(d), 0.0)


def _known(batch_stats, options):
    mean, var = (np.asarray(batch_stats[name], np.float64) for name in ("mean", "var"))
    momentum = options.get("momentum", 0.99)
    if not options.get("debias") or momentum in (None, 1) or batch_stats["count"] == 0:
        return {"mean": mean, "var": var}
    share = momentum ** int(batch_stats["count"])
    return {"mean": mean / (1 - share), "var": (var - share) / (1 - share)}


def _remembered(old, x, weights, axes, options):
    count, mean, var = (np.squeeze(part, axes) for part in _moments(lax.stop_gradient(x), weights, axes))
    seen = np.sum(weights > 0, axes) > 1
    if options.get("skip_nonfinite") and not (np.isfinite(mean).all() and np.isfinite(var).all()):
        return old
    bessel = lambda n: np.maximum(n, 1) / np.maximum(n - 1, 1) if options.get("unbiased") else 1.0  # noqa: E731
    momentum = options.get("momentum", 0.99)
    if momentum is None:
        rows = np.asarray(old["rows"], np.float64)
        total = np.where(rows + count > 0, rows + count, 1)
        pooled = (rows * old["mean"] + count * mean) / total
        before = np.asarray(old["var"] / bessel(rows) + (old["mean"] - pooled) ** 2)
        new_mean = pooled
        new_var = (rows * before + count * (var + (mean - pooled) ** 2)) / total * bessel(rows + count)
    else:
        new_mean = momentum * old["mean"] + (1 - momentum) * mean
        new_var = momentum * old["var"] + (1 - momentum) * var * bessel(count)
    new = {"mean": np.where(seen, new_mean, old["mean"]), "var": np.where(seen, new_var, old["var"])}
    if "rows" in old:
        new["rows"] = old["rows"] + np.where(seen, count, 0)
        new["count"] = old["count"] + int(seen.any())
    return new
