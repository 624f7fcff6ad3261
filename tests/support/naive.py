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
    known = None if batch_stats is None else _known(batch_stats, options)
    expand = lambda value: value if value.ndim == x.ndim else jnp.expand_dims(value, axes)  # noqa: E731
    x = jnp.where(weights > 0, x, lax.stop_gradient(x))
    if evaluating and batch_stats is not None:
        x_hat = (x - expand(known["mean"])) / jnp.sqrt(expand(known["var"]) + epsilon)
        new = batch_stats
    else:
        size = options.get("virtual_batch_size") or x.shape[axes[0]]
        groups = np.split(np.arange(x.shape[axes[0]]), x.shape[axes[0]] // size)
        parts = [(jnp.take(x, g, axes[0]), np.take(weights, g, axes[0])) for g in groups]
        x_hat = jnp.concatenate(
            [_hat(*part, axes, epsilon, options.get("renorm"), known, expand) for part in parts], axes[0]
        )
        new = None if batch_stats is None else _updated(batch_stats, x, weights, axes, options)
    y = x_hat
    if "scale" in params:
        y = y * expand(params["scale"])
    if "bias" in params:
        y = y + expand(params["bias"])
    y = jnp.where(weights > 0, y, lax.stop_gradient(y))
    if residual is not None:
        y = y + residual
    activation = options.get("activation")
    if activation == "relu":
        y = jnp.where(y <= 0, 0.0, y)  # NaN stays NaN
    elif activation is not None:
        y = activation(y)
    return y, lax.stop_gradient(new)


def _moments(x, weights, axes):
    count = np.sum(weights, axes, keepdims=True)
    divisor = np.where(count > 0, count, 1)
    mean = jnp.sum(weights * x, axes, keepdims=True) / divisor
    var = jnp.sum(weights * _square(x - mean), axes, keepdims=True) / divisor
    return count, mean, var


def _square(value):
    return jnp.real(value) ** 2 + jnp.imag(value) ** 2


def _hat(x, weights, axes, epsilon, renorm, known, expand):
    _, mean, var = _moments(x, weights, axes)
    rows = np.sum(weights > 0, axes, keepdims=True)
    some = rows > 1
    square = jnp.where(some, var, 1.0) + epsilon
    some &= square != 0  # of a constant channel without epsilon, y is bias
    sigma_batch = jnp.sqrt(jnp.where(some, square, 1.0))
    nothing = 0.0 * x  # and NaN of a value that is not finite
    x_hat = jnp.where(some, (x - mean) / sigma_batch, nothing)
    if renorm is None:
        return x_hat
    sigma = jnp.sqrt(expand(known["var"]) + epsilon)
    r = jnp.clip(sigma_batch / sigma, 1 / renorm.r_max, renorm.r_max)
    d = jnp.clip((mean - expand(known["mean"])) / sigma, -renorm.d_max, renorm.d_max)
    return jnp.where(rows > 0, x_hat * lax.stop_gradient(r) + lax.stop_gradient(d), nothing)


def _known(batch_stats, options):
    mean, var = (np.asarray(batch_stats[name]) for name in ("mean", "var"))
    momentum = options.get("momentum", 0.99)
    if not options.get("debias") or momentum in (None, 1) or batch_stats["count"] == 0:
        return {"mean": mean, "var": var}
    share = momentum ** int(batch_stats["count"])
    return {"mean": mean / (1 - share), "var": (var - share) / (1 - share)}


def _share(share, value):
    """None of it where the share is 0, were it NaN."""
    return share * value if share else np.zeros(value.shape)


def _updated(old, x, weights, axes, options):
    count, mean, var = (part.squeeze(axes) for part in _moments(lax.stop_gradient(x), weights, axes))
    seen = np.sum(weights > 0, axes) > 1
    bessel = lambda n: np.maximum(n, 1) / np.maximum(n - 1, 1) if options.get("unbiased") else 1.0  # noqa: E731
    momentum = options.get("momentum", 0.99)
    if momentum is None:
        rows = np.asarray(old["rows"], np.float64)
        total = np.where(rows + count > 0, rows + count, 1)
        pooled = (rows * old["mean"] + count * mean) / total
        before = old["var"] / bessel(rows) + _square(old["mean"] - pooled)
        new_mean = pooled
        new_var = (rows * before + count * (var + _square(mean - pooled))) / total * bessel(rows + count)
    else:
        new_mean = _share(momentum, old["mean"]) + _share(1 - momentum, mean)
        new_var = _share(momentum, old["var"]) + _share(1 - momentum, var * bessel(count))
    new = {"mean": jnp.where(seen, new_mean, old["mean"]), "var": jnp.where(seen, new_var, old["var"])}
    if "rows" in old:
        new["rows"] = old["rows"] + np.where(seen, count, 0)
        new["count"] = old["count"] + int(seen.any())
    if options.get("skip_nonfinite"):
        good = jnp.isfinite(mean).all() & jnp.isfinite(var).all()
        new = {name: jnp.where(good, value, old[name]) for name, value in new.items()}
    return new
