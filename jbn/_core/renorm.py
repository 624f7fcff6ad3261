"""Batch renormalization: the batch's statistics, corrected towards the running ones."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jbn._core.dtypes import compute_dtype
from jbn._core.statistics import ShiftedMoments, inverse_std


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Renorm:
    """Limits of batch renormalization, for `jbn.batch_norm(..., renorm=...)`: a frozen pytree.

        y = scale * (x_hat * r + d) + bias
        r = clip(sigma_batch / sigma, r_min, r_max),  d = clip((mean_batch - mean) / sigma, -d_max, d_max)

    x_hat is x normalized by its batch, mean and sigma = sqrt(var + epsilon) are the running ones. r and d are
    constants for the gradient. What training computes is then close to what evaluation will compute, also
    for small batches. `Renorm(1, 0)` is batch norm. The paper starts there and raises r_max to 3 and d_max
    to 5 over the first epochs: pass scalar arrays, such as values of an Optax schedule, and nothing is
    compiled again.

    Attributes:
      r_max: from 1 up; inf is no limit.
      d_max: from 0 up.
      r_min: from 0 to 1; None is 1 / r_max. TensorFlow and Keras set it separately, as `rmin`.

    Example:
      >>> import jax.numpy as jnp, jbn, optax
      >>> limit = optax.linear_schedule(1.0, 3.0, transition_steps=100)
      >>> params, batch_stats = jbn.init(1)
      >>> x, settings = jnp.array([[1.0], [3.0]]), {"use_running_average": False}
      >>> y, _ = jbn.batch_norm(params, batch_stats, x, renorm=jbn.Renorm(limit(50), d_max=0.5), **settings)
      >>> print(y[:, 0].round(2))
      [-0.5  1.5]

    Reference: Ioffe 2017, arXiv 1702.03275.
    """

    r_max: float | Float[Array, ""]
    d_max: float | Float[Array, ""]
    r_min: float | Float[Array, ""] | None = None


class RenormReference(NamedTuple):
    """What renormalization corrects towards: running statistics of x's rank, and limits."""

    mean: Array
    var: Array
    r_max: Array
    d_max: Array
    r_min: Array


def renorm_reference(renorm: Renorm, mean: Array, var: Array) -> RenormReference:
    """The limits as arrays, beside the running statistics."""
    r_max, d_max, r_min = vars(renorm).values()
    limits = (r_max, d_max, 1 / jnp.asarray(r_max) if r_min is None else r_min)
    return RenormReference(mean, var, *map(jnp.asarray, limits))


def renormalized(
    epsilon: float,
    measured: ShiftedMoments,
    reference: RenormReference | None,
    scale: Array | None,
    bias: Array | None,
) -> tuple[Array | None, Array | None]:
    """Scale and bias with the correction in them: scale * r, and bias + scale * d.

    Of one value x_hat is 0, and y = scale * d + bias; of none there is nothing to correct, and y is bias.
    """
    if reference is None:
        return scale, bias
    dtype = measured.var.dtype
    inverse = inverse_std(reference.var.astype(dtype), epsilon)
    # r = sigma_batch / sigma, d = (mean_batch - mean) / sigma
    r = jnp.sqrt(measured.var + np.asarray(epsilon, dtype)) * inverse
    d = ((measured.shift - reference.mean.astype(dtype)) + measured.delta) * inverse
    r_max, d_max, r_min = (
        limit.astype(dtype) for limit in (reference.r_max, reference.d_max, reference.r_min)
    )
    has_rows = measured.num_valid > 0
    r = lax.stop_gradient(jnp.where(has_rows, jnp.clip(r, r_min, r_max), jnp.ones_like(r)))
    d = lax.stop_gradient(jnp.where(has_rows, jnp.clip(d, -d_max, d_max), jnp.zeros_like(d)))
    dtype = compute_dtype(*(part.dtype for part in (r, scale, bias) if part is not None))
    r, d = r.astype(dtype), d.astype(dtype)
    if scale is not None:
        r, d = scale.astype(dtype) * r, scale.astype(dtype) * d
    return r, d if bias is None else bias.astype(dtype) + d
