"""How running statistics are updated: moving and cumulative averages, and debiasing."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jbn._core.arguments import check_batch_stats, check_counters
from jbn._core.dtypes import compute_dtype, reduction_dtype, unwrapped
from jbn._core.errors import describe, error, public
from jbn._core.moments import Moments, how_to_have_moments, merge_all
from jbn._core.options import check_momentum, check_static
from jbn._core.sharding import sharded_like
from jbn._core.types import BatchStats

SATURATED_COUNT = 2**30
"""From so many updates on, a count says that there were many: i32 has room for as many more."""


@public
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

    `momentum` weighs the OLD value, as in Flax (PyTorch's 0.1 is 0.9 here). A channel that has no row
    in the batch keeps its statistics.

    Args:
      batch_stats: `mean` and `var`, as from `jbn.init`, and `count` and `rows` if it has them.
      moments: of the batch, as from `jbn.moments`.
      momentum: from 0 (the batch replaces the old value) to 1 (the old value stays); may be a traced
        scalar. None is cumulative: the statistics of all rows so far, pooled as in `jbn.merge`; needs `rows`.
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
    return checked_update(
        batch_stats, moments, momentum=momentum, unbiased=unbiased, skip_nonfinite=skip_nonfinite
    )


def checked_update(
    batch_stats: BatchStats,
    moments: Moments,
    *,
    momentum: float | Array | None,
    unbiased: bool,
    skip_nonfinite: bool,
) -> BatchStats:
    """`update`, whose errors have no name yet: for tools that are called otherwise."""
    batch_stats, moments, momentum = map(unwrapped, (batch_stats, moments, momentum))
    check_momentum(momentum)
    for name, choice in (("unbiased", unbiased), ("skip_nonfinite", skip_nonfinite)):
        check_static(name, choice)
    if not isinstance(moments, Moments) or len({np.shape(part) for part in vars(moments).values()}) > 1:
        fix = how_to_have_moments([moments], "Measure x: jbn.moments(x).")
        raise error("moments", describe(moments), "jbn.Moments", fix)
    check_batch_stats(batch_stats, moments.mean, ())
    check_counters(batch_stats, momentum, debias=False, training=True)
    return update_running(
        batch_stats, moments, momentum, moments.count > 0, unbiased=unbiased, skip_nonfinite=skip_nonfinite
    )


@functools.partial(jax.tree_util.register_dataclass, data_fields=("keep", "add"), meta_fields=("is_static",))
@dataclasses.dataclass(frozen=True)
class Decay:
    """What the old and the new value weigh in a moving average.

    If it is static, a weight of 0 is given as None: the compiler then has nothing to select.
    """

    keep: float | Array | None
    add: float | Array | None
    is_static: bool = False


def update_running(
    batch_stats: BatchStats,
    moments: Moments,
    momentum: float | Array | None,
    update_mask: Bool[Array, "*C"] | None,
    *,
    unbiased: bool,
    skip_nonfinite: bool,
) -> BatchStats:
    """`update` for the channels of `update_mask`; the others keep their statistics. None is all channels."""
    decay = None
    if isinstance(momentum, float | int):
        # Both are rounded once: 1 - momentum taken in float32 would be off by 6e-6 of itself at 0.99. They
        # stay arguments of the compiled update: as constants, each would be compiled.
        least = jnp.finfo(reduction_dtype(batch_stats["var"].dtype, moments.var.dtype)).tiny
        keep, add = (part if part >= least else None for part in (momentum, 1 - momentum))  # XLA flushes to 0
        decay = Decay(keep, add, is_static=True)
    elif momentum is not None:
        decay = Decay(momentum, 1 - momentum)
    new_stats: BatchStats = _update_running(
        batch_stats, moments, decay, update_mask, unbiased=unbiased, skip_nonfinite=skip_nonfinite
    )
    return new_stats


@functools.partial(jax.jit, static_argnames=("unbiased", "skip_nonfinite"))
def _update_running(
    batch_stats: BatchStats,
    moments: Moments,
    decay: Decay | None,
    update_mask: Bool[Array, "*C"] | None,
    *,
    unbiased: bool,
    skip_nonfinite: bool,
) -> BatchStats:
    """The update as one compiled function; without a decay it is cumulative."""
    if skip_nonfinite:  # as they are kept: what is finite here, float16 may not hold
        for name, value in (("mean", moments.mean), ("var", _stored_var(moments, unbiased))):
            finite = jnp.all(jnp.isfinite(value.astype(batch_stats[name].dtype)))
            update_mask = (
                jnp.broadcast_to(finite, value.shape) if update_mask is None else update_mask & finite
            )
    moments, update_mask = jax.tree.map(
        lambda part: sharded_like(part, batch_stats["mean"]), (moments, update_mask)
    )
    if decay is None:
        mean, var = _cumulative(batch_stats, moments, unbiased)
    else:
        mean = moving_average(batch_stats["mean"], moments.mean, decay)
        var = moving_average(batch_stats["var"], _stored_var(moments, unbiased), decay)
    new = {"mean": mean, "var": var}
    rows, updates = moments.count, jnp.ones((), bool)
    if update_mask is not None:
        new = {name: jnp.where(update_mask, v, batch_stats[name].astype(v.dtype)) for name, v in new.items()}
        rows, updates = jnp.where(update_mask, rows, jnp.zeros_like(rows)), jnp.any(update_mask)
    if "rows" in batch_stats:
        dtype = reduction_dtype(batch_stats["rows"].dtype, rows.dtype)
        new["rows"] = batch_stats["rows"].astype(dtype) + rows.astype(dtype)
    if "count" in batch_stats:
        new["count"] = batch_stats["count"] + updates.astype(batch_stats["count"].dtype)
    result: BatchStats = jax.tree_util.tree_map_with_path(
        lambda path, old: cast_like(new[path[-1].key], old), batch_stats
    )
    return result


def _cumulative(batch_stats: BatchStats, moments: Moments, unbiased: bool) -> tuple[Array, Array]:
    """Mean and variance of all rows seen so far; what was stored unbiased is pooled as what it was before."""
    real = reduction_dtype(batch_stats["mean"].dtype, moments.mean.dtype)
    rows = batch_stats["rows"].astype(real)
    mean, var = (
        batch_stats["mean"].astype(compute_dtype(batch_stats["mean"].dtype, real)),
        batch_stats["var"].astype(real),
    )
    before = Moments(rows, mean, var / _bessel(rows) if unbiased else var)
    batch = Moments(moments.count.astype(real), moments.mean.astype(mean.dtype), moments.var.astype(real))
    pooled = merge_all((before, batch))
    return pooled.mean, _stored_var(pooled, unbiased)


def _stored_var(moments: Moments, unbiased: bool) -> Float[Array, "*C"]:
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
    dtype, count = reduction_dtype(var.dtype), jnp.asarray(batch_stats["count"])
    count = jnp.expand_dims(count, range(count.ndim, var.ndim))  # one of each layer, if layers are stacked
    # share = momentum^count is what is left of the initial values, learned = 1 - share to all digits
    log_share = jnp.maximum(count, 1).astype(dtype) * np.asarray(
        math.log(momentum) if momentum else -np.inf, dtype
    )
    has_updates = count > 0
    share = jnp.where(has_updates, jnp.exp(log_share), jnp.zeros_like(log_share))
    learned = jnp.where(has_updates, -jnp.expm1(log_share), jnp.ones_like(log_share))
    mean = mean.astype(compute_dtype(mean.dtype, dtype))
    mean = mean / learned.astype(mean.dtype)
    return {"mean": mean, "var": jnp.maximum((var.astype(dtype) - share) / learned, 0)}


def store_debiased(batch_stats: BatchStats, momentum: float | None) -> dict[str, Array]:
    """Statistics that evaluate without debiasing as these, which have a count, do with it."""
    count = jnp.asarray(batch_stats["count"])
    new = debiased(batch_stats, momentum)
    values = {name: new[name].astype(batch_stats[name].dtype) for name in ("mean", "var")}
    return {**batch_stats, **values, "count": jnp.where(count > 0, saturated(count), count)}


def saturated(count: Array) -> Array:
    """A count of so many updates that nothing is left of initial statistics."""
    return jnp.full_like(count, min(SATURATED_COUNT, jnp.iinfo(count.dtype).max // 2 + 1))


def moving_average(old: Array, new: Array, decay: Decay) -> Array:
    """keep * old + add * new, in float32 or wider; nothing of a value whose weight is 0."""
    dtype = compute_dtype(old.dtype, new.dtype)

    def weighted(weight: float | Array | None, value: Array) -> Array:
        if weight is None:
            return jnp.zeros_like(value)
        weight = jnp.asarray(weight, dtype)
        if decay.is_static:
            return weight * value
        # 0 times NaN or inf would be NaN. The derivative in a weight of 0 is the value all the same.
        return weight * jnp.where((weight == 0) & ~jnp.isfinite(value), jnp.zeros_like(value), value)

    return weighted(decay.keep, old.astype(dtype)) + weighted(decay.add, new.astype(dtype))


def cast_like(new: Array, old: Array) -> Array:
    """The new value with dtype and weak type of the old: a scan carry, and no second compilation."""
    new = new.astype(old.dtype)
    if getattr(old, "weak_type", False) and not new.weak_type:
        new = jnp.vectorize(lax.full_like)(old, new)
    return new
