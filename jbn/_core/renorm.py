"""Batch renormalization: the batch's statistics, corrected towards the running ones."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jbn._core.arguments import as_numbers
from jbn._core.dtypes import X, describe, working
from jbn._core.errors import error
from jbn._core.scalars import is_share
from jbn._core.statistics import Measured, inverse_deviation


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
      r_min: from 0 to 1; None is 1 / r_max. TensorFlow and Keras have a limit of its own here, `rmin`.

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


class Reference(NamedTuple):
    """What renormalization corrects towards: running statistics of x's rank, and limits."""

    mean: Array
    var: Array
    r_max: Array
    d_max: Array
    r_min: Array


def renormalized(
    epsilon: float, measured: Measured, reference: Reference | None, scale: Array | None, bias: Array | None
) -> tuple[Array | None, Array | None]:
    """Scale and bias with the correction in them: scale * r, and bias + scale * d.

    Of one value x_hat is 0, and y = scale * d + bias; of none there is nothing to correct, and y is bias.
    """
    if reference is None:
        return scale, bias
    kind = measured.var.dtype
    inverse = inverse_deviation(reference.var.astype(kind), epsilon)
    r = jnp.sqrt(measured.var + np.asarray(epsilon, kind)) * inverse
    d = ((measured.shift - reference.mean.astype(kind)) + measured.rest) * inverse
    r_max, d_max, r_min = (
        limit.astype(kind) for limit in (reference.r_max, reference.d_max, reference.r_min)
    )
    some = measured.values > 0
    r = lax.stop_gradient(jnp.where(some, jnp.clip(r, r_min, r_max), jnp.ones_like(r)))
    d = lax.stop_gradient(jnp.where(some, jnp.clip(d, -d_max, d_max), jnp.zeros_like(d)))
    kind = working(*(part.dtype for part in (r, scale, bias) if part is not None))
    r, d = r.astype(kind), d.astype(kind)
    if scale is not None:
        r, d = scale.astype(kind) * r, scale.astype(kind) * d
    return r, d if bias is None else bias.astype(kind) + d


def check_renorm(renorm: Any, x: X) -> None:
    """Limits that are possible, and real x."""
    if renorm is None:
        return
    limits = {"r_max": 1, "d_max": 0}
    if not isinstance(renorm, Renorm) or not all(
        _is_scalar_from(lowest, getattr(renorm, name)) for name, lowest in limits.items()
    ):
        raise error(
            "renorm",
            describe(renorm),
            "jbn.Renorm(r_max, d_max) with scalars, r_max from 1 and d_max from 0 up",
            "The paper ends at jbn.Renorm(3.0, 5.0).",
        )
    if renorm.r_min is not None and not is_share(renorm.r_min):
        raise error(
            "renorm",
            f"given with r_min = {describe(renorm.r_min)}",
            "a scalar r_min from 0 to 1, or None",
            "None is 1 / r_max, as in the paper.",
        )
    if jnp.iscomplexobj(x):
        raise error(
            "renorm",
            f"given for x = {describe(x)}",
            "real x",
            "How to clip a complex d, no paper says.",
        )


def _is_scalar_from(lowest: int, value: Any) -> bool:
    """Whether the value is a real scalar, and in the range as far as that is known while tracing."""
    array = as_numbers(value)
    if array is None or array.shape or jnp.iscomplexobj(array):
        return False
    # By NumPy: while jit traces, jnp.asarray(0.5) and a comparison of arrays are traced too.
    return isinstance(value, jax.core.Tracer) or bool(np.asarray(value) >= lowest)
