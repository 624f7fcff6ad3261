"""How running statistics remember: the update rule."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jbn._core.arguments import check_batch_stats, unwrapped
from jbn._core.dtypes import BatchStats, describe, sharded_like, wide, working
from jbn._core.errors import error, names_errors
from jbn._core.moments import Moments, merge
from jbn._core.options import check_counters
from jbn._core.scalars import check_momentum, check_static

MANY = 2**30
"""From so many updates on a count stands for updates without end: i32 has room for as many more."""


@names_errors
def update(
    batch_stats: BatchStats,
    moments: Moments,
    *,
    momentum: float | Array | None = 0.99,
    unbiased: bool = False,
    skip_nonfinite: bool = False,
) -> BatchStats:
    """Running statistics after a batch with these moments.

        new = momentum * old + (1 - momentum) * batch

    `momentum` weighs the OLD value, as in Flax (PyTorch's 0.1 is 0.9 here). A channel of which the batch has
    no row keeps its statistics.

    Args:
      batch_stats: `mean` and `var`, as from `jbn.init`, and `count` and `rows` if it has them.
      moments: of the batch, as from `jbn.moments`.
      momentum: from 0 (the batch replaces the old) to 1 (the old stays); may be a traced scalar. None is
        cumulative: the statistics of all rows so far, pooled as in `jbn.merge`; needs `rows`.
      unbiased: whether the variance that is stored is multiplied by n / (n - 1).
      skip_nonfinite: whether moments with NaN or inf in any channel update nothing.

    Returns:
      New batch_stats: the same structure, shapes and dtypes; computed in float32 or wider.

    Raises:
      ValueError: a momentum outside [0, 1], entries or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jbn
      >>> _, batch_stats = jbn.init(1)
      >>> batch = jbn.moments(jnp.array([[1.0], [3.0]]))
      >>> print(jbn.update(batch_stats, batch, momentum=0.9)["mean"])
      [0.2]

    Reference: Ioffe and Szegedy 2015, arXiv 1502.03167, section 3.1.
    """
    return updated(batch_stats, moments, momentum=momentum, unbiased=unbiased, skip_nonfinite=skip_nonfinite)


def updated(
    batch_stats: BatchStats,
    moments: Moments,
    *,
    momentum: float | Array | None,
    unbiased: bool,
    skip_nonfinite: bool,
) -> BatchStats:
    """`update`, of which errors do not know yet which function the user called."""
    batch_stats = unwrapped(batch_stats)
    check_momentum(momentum)
    for name, choice in (("unbiased", unbiased), ("skip_nonfinite", skip_nonfinite)):
        check_static(name, choice)
    if not isinstance(moments, Moments) or len({np.shape(part) for part in vars(moments).values()}) > 1:
        raise error("moments", describe(moments), "jbn.Moments", "Measure x: jbn.moments(x).")
    check_batch_stats(batch_stats, moments.mean, ())
    check_counters(batch_stats, momentum, debias=False, training=True)
    return remember(
        batch_stats, moments, momentum, moments.count > 0, unbiased=unbiased, skip_nonfinite=skip_nonfinite
    )


def remember(
    batch_stats: BatchStats,
    moments: Moments,
    momentum: float | Array | None,
    seen: Bool[Array, "*C"] | None,
    *,
    unbiased: bool,
    skip_nonfinite: bool,
) -> BatchStats:
    """`update` for the channels where `seen`; the others keep their statistics. None is all channels."""
    # Both shares are rounded once: 1 - momentum taken in float32 would be off by 6e-6 of itself at 0.99.
    shares: Any = None if momentum is None else (momentum, 1 - momentum)
    known = isinstance(momentum, float | int)
    if known:  # which one is 0; the values stay arguments: as constants, each would be compiled
        least = jnp.finfo(wide(batch_stats["var"].dtype, moments.var.dtype)).tiny  # below, XLA flushes to 0
        shares = tuple(share if share >= least else None for share in shares)
    new_stats: BatchStats = _remember(batch_stats, moments, shares, seen, known, unbiased, skip_nonfinite)
    return new_stats


@functools.partial(jax.jit, static_argnames=("known", "unbiased", "skip_nonfinite"))
def _remember(
    batch_stats: BatchStats,
    moments: Moments,
    shares: tuple[Array | None, ...] | None,
    seen: Bool[Array, "*C"] | None,
    known: bool,
    unbiased: bool,
    skip_nonfinite: bool,
) -> BatchStats:
    if skip_nonfinite:  # as they are kept: what is finite here, float16 may not hold
        for name, value in (("mean", moments.mean), ("var", _stored(moments, unbiased))):
            finite = jnp.all(jnp.isfinite(value.astype(batch_stats[name].dtype)))
            seen = jnp.broadcast_to(finite, value.shape) if seen is None else seen & finite
    moments, seen = jax.tree.map(lambda part: sharded_like(part, batch_stats["mean"]), (moments, seen))
    if shares is None:
        mean, var = _cumulative(batch_stats, moments, unbiased)
    else:
        mean = moving_average(batch_stats["mean"], moments.mean, shares, known=known)
        var = moving_average(batch_stats["var"], _stored(moments, unbiased), shares, known=known)
    new = {"mean": mean, "var": var}
    rows, updates = moments.count, jnp.ones((), bool)
    if seen is not None:
        new = {name: jnp.where(seen, v, batch_stats[name].astype(v.dtype)) for name, v in new.items()}
        rows, updates = jnp.where(seen, rows, jnp.zeros_like(rows)), jnp.any(seen)
    if "rows" in batch_stats:
        kind = wide(batch_stats["rows"].dtype, rows.dtype)
        new["rows"] = batch_stats["rows"].astype(kind) + rows.astype(kind)
    if "count" in batch_stats:
        new["count"] = batch_stats["count"] + updates.astype(batch_stats["count"].dtype)
    result: BatchStats = jax.tree_util.tree_map_with_path(
        lambda path, old: _like(old, new[path[-1].key]), batch_stats
    )
    return result


def _cumulative(batch_stats: BatchStats, moments: Moments, unbiased: bool) -> tuple[Array, Array]:
    """Mean and variance of all rows seen so far; what was stored unbiased is pooled as what it was before."""
    real = wide(batch_stats["mean"].dtype, moments.mean.dtype)
    rows = batch_stats["rows"].astype(real)
    mean, var = (
        batch_stats["mean"].astype(working(batch_stats["mean"].dtype, real)),
        batch_stats["var"].astype(real),
    )
    before = Moments(rows, mean, var / _bessel(rows) if unbiased else var)
    batch = Moments(moments.count.astype(real), moments.mean.astype(mean.dtype), moments.var.astype(real))
    total = merge(before, batch)
    return total.mean, _stored(total, unbiased)


def _stored(moments: Moments, unbiased: bool) -> Float[Array, "*C"]:
    """The variance as it is kept."""
    return moments.var * _bessel(moments.count) if unbiased else moments.var


def _bessel(count: Float[Array, "*C"]) -> Float[Array, "*C"]:
    """n / (n - 1), and 1 for n = 1, whose variance is 0; continued in between, for fractional weights."""
    return jnp.maximum(count, 1) / jnp.maximum(count - 1, 1)


def debiased(batch_stats: BatchStats, momentum: Any) -> BatchStats:
    """Mean and variance without the share that the initial 0 and 1 still have in them.

        mean / (1 - momentum^count),  (var - momentum^count) / (1 - momentum^count)

    Before any update, and where momentum is 1, they are 0 and 1 as they are. Cumulative statistics have no
    such share. The stored variance was rounded about 1: after the division an error of 6e-8 is one of
    6e-8 / (1 - momentum^count).
    """
    mean, var = batch_stats["mean"], batch_stats["var"]
    if momentum is None or momentum == 1:
        return batch_stats
    kind, count = wide(var.dtype), jnp.asarray(batch_stats["count"])
    count = jnp.expand_dims(count, range(count.ndim, var.ndim))  # one of each layer, if layers are stacked
    log_share = jnp.maximum(count, 1).astype(kind) * np.asarray(
        math.log(momentum) if momentum else -np.inf, kind
    )
    updated = count > 0
    share = jnp.where(updated, jnp.exp(log_share), jnp.zeros_like(log_share))
    learned = jnp.where(updated, -jnp.expm1(log_share), jnp.ones_like(log_share))  # 1 - share, to all digits
    mean = mean.astype(working(mean.dtype, kind))
    mean = mean / learned.astype(mean.dtype)
    return {"mean": mean, "var": jnp.maximum((var.astype(kind) - share) / learned, 0)}


def without_end(count: Array) -> Array:
    """A count of updates without end, after which nothing is left of initial statistics."""
    return jnp.full_like(count, jnp.iinfo(count.dtype).max // 2 + 1)


def moving_average(
    old: Array, new: Array, shares: Sequence[float | Array | None], *, known: bool = False
) -> Array:
    """keep * old + forget * new, for these shares, in float32 or wider; nothing of a value whose share is 0.

    Where it is known which one is 0, and given as None, the compiler has nothing to select.
    """
    dtype = working(old.dtype, new.dtype)

    def part(share: float | Array | None, value: Array) -> Array:
        if share is None:
            return jnp.zeros_like(value)
        share = jnp.asarray(share, dtype)
        if known:
            return share * value
        # 0 times NaN or inf would be NaN. The derivative in a share of 0 is the value all the same.
        return share * jnp.where((share == 0) & ~jnp.isfinite(value), jnp.zeros_like(value), value)

    keep, forget = shares
    return part(keep, old.astype(dtype)) + part(forget, new.astype(dtype))


def _like(old: Array, new: Array) -> Array:
    """The new value with dtype and weak type of the old: a scan carry, and no second compilation."""
    new = new.astype(old.dtype)
    if getattr(old, "weak_type", False) and not new.weak_type:
        new = jnp.vectorize(lax.full_like)(old, new)
    return new
