"""How running statistics remember: the update rule."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from jbn._checks import check_batch_stats, check_momentum
from jbn._moments import Moments
from jbn._types import BatchStats, sharded_like, working


def update(batch_stats: BatchStats, moments: Moments, *, momentum: float | Array = 0.99) -> BatchStats:
    """Running statistics after a batch with these moments.

        new = momentum * old + (1 - momentum) * batch

    `momentum` weighs the OLD value, as in Flax (PyTorch's 0.1 is 0.9 here). The variance that is stored is
    the biased one. A channel of which the batch has no row keeps its statistics.

    Args:
      batch_stats: `mean` and `var`, as from `jbn.init`, and `count` and `rows` if it has them.
      moments: of the batch, as from `jbn.moments`.
      momentum: from 0 (the batch replaces the old) to 1 (the old stays); may be a traced scalar.

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
    check_momentum("update", momentum)
    check_batch_stats("update", batch_stats, moments.mean, ())
    return remember(batch_stats, moments, momentum, moments.count > 0)


def remember(
    batch_stats: BatchStats, moments: Moments, momentum: float | Array, seen: Bool[Array, "*C"]
) -> BatchStats:
    """`update` for the channels where `seen`; the others keep their statistics."""
    # Both shares are rounded once: 1 - momentum taken in float32 would be off by 6e-6 of itself at 0.99.
    new_stats: BatchStats = _remember(batch_stats, moments, (momentum, 1 - momentum), seen)
    return new_stats


@functools.partial(jax.jit, inline=True)
def _remember(
    batch_stats: BatchStats, moments: Moments, shares: tuple[Array, Array], seen: Bool[Array, "*C"]
) -> BatchStats:
    def average(old: Array, batch: Array) -> Array:
        new = moving_average(old, batch, shares)
        return jnp.where(seen, new, old.astype(new.dtype))

    moments, seen = jax.tree.map(lambda part: sharded_like(part, batch_stats["mean"]), (moments, seen))
    new = {name: average(batch_stats[name], getattr(moments, name)) for name in ("mean", "var")}
    if "rows" in batch_stats:
        new["rows"] = batch_stats["rows"] + jnp.where(seen, moments.count, jnp.zeros_like(moments.count))
    if "count" in batch_stats:
        new["count"] = batch_stats["count"] + jnp.any(seen).astype(jnp.int32)
    result: BatchStats = jax.tree_util.tree_map_with_path(
        lambda path, old: _like(old, new[path[-1].key]), batch_stats
    )
    return result


def moving_average(old: Array, new: Array, shares: tuple[float | Array, float | Array]) -> Array:
    """keep * old + forget * new, for these shares, in float32 or wider."""
    dtype = working(old.dtype, new.dtype)
    keep, forget = (jnp.asarray(share, dtype) for share in shares)
    return keep * old.astype(dtype) + forget * new.astype(dtype)


def _like(old: Array, new: Array) -> Array:
    """The new value with dtype and weak type of the old: a scan carry, and no second compilation."""
    new = new.astype(old.dtype)
    if getattr(old, "weak_type", False) and not new.weak_type:
        new = jnp.vectorize(lax.full_like)(old, new)
    return new
