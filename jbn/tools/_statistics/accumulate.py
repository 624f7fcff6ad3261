"""Accumulation: one update of running statistics for many micro-batches."""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jbn._core.dtypes import promote_stats, unwrapped
from jbn._core.errors import public
from jbn._core.options import check_momentum
from jbn._core.running import checked_update
from jbn.tools._models import (
    Variables,
    batch_norms,
    errors_at,
    moments_of,
    with_values,
    without_batch_moments,
)

Model = TypeVar("Model", bound=Variables)


@public
def apply_moments(
    variables: Model,
    moments: Any = None,
    *,
    momentum: float | jax.Array | None = 0.99,
    unbiased: bool = False,
    skip_nonfinite: bool = False,
) -> Model:
    """One update of every batch norm by the moments of a whole batch, which came in micro-batches.

        new = momentum * old + (1 - momentum) * batch

    To accumulate gradients over K micro-batches, with one update of the statistics: call the model with
    `update_batch_stats=False`, or drop the new `batch_stats`. Keep `batch_moments` from call to call, where
    each layer merges the moments of its batches, and apply them once at the end. (Each micro-batch is still
    normalized by itself.) The next K begin without moments: this call takes out those in the variables. If
    you keep moments elsewhere, as below, drop them yourself.
    Stacked layers (`nn.scan`, `nn.vmap`) need `'batch_moments': 0` in `variable_axes`, as for `batch_stats`.

    Args:
      variables: linen variables or an NNX module; not changed.
      moments: variables with the collection `batch_moments`, as `model.apply` returns them, or an NNX model
        after `jbn.nnx.keep_batch_moments`; or a mapping from path, `"block/bn"` or `("block", "bn")`, to
        `jbn.Moments`; None: those in variables.
      momentum: that of the layers, which this call cannot see: pass it if it is not 0.99, their default.
        From 0 (the batch replaces the old) to 1; may be a traced scalar. None is cumulative.
      unbiased: that of the layers, as in `jbn.update`.
      skip_nonfinite: that of the layers: whether moments with NaN or inf leave the statistics of their layer
        as they are. In a stack of layers that keeps no `count`, which would tell how many there are, those of
        all its layers.

    Returns:
      A model of the same kind with new `batch_stats`. Layers without moments, or with no rows in them, keep
      theirs. If the moments were those in variables, it holds none: linen variables are without the
      collection, and in an NNX module their count is 0.

    Raises:
      ValueError: no moments at all, moments of a layer that the model does not have, shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jbn, jbn.linen, jbn.tools
      >>> layer, (params, batch_stats) = jbn.linen.BatchNorm(use_running_average=False), jbn.init(1)
      >>> variables, moments = {"params": params, "batch_stats": batch_stats}, {}
      >>> for rows in (jnp.array([[0.0], [1]]), jnp.array([[2.0], [3]])):
      ...     _, moments = layer.apply(
      ...         variables | moments, rows, update_batch_stats=False, mutable=["batch_moments"]
      ...     )
      >>> print(jbn.tools.apply_moments(variables, moments, momentum=0.0)["batch_stats"]["mean"])
      [1.5]
    """
    momentum = unwrapped(momentum)
    check_momentum(momentum)
    layers = batch_norms(variables)
    given: Any = variables if moments is None else moments
    step = functools.partial(
        checked_update, momentum=momentum, unbiased=unbiased, skip_nonfinite=skip_nonfinite
    )
    stats = {}
    for path, batch in moments_of(given, layers).items():
        old = layers[path].batch_stats
        with errors_at(path):
            of_layer = step
            for _ in range(jnp.ndim(old.get("count", 0))):  # one of each layer, if layers are stacked
                of_layer = jax.vmap(of_layer)
            stats[path] = of_layer(old | promote_stats(old, batch.mean), batch)
    new: Model = with_values(variables, batch_stats=stats)
    return without_batch_moments(new) if given is variables else new
