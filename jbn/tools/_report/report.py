"""A report on every batch norm of a model, and why its evaluation differs from training."""

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jbn._core.errors import public
from jbn._core.moments import Moments
from jbn._core.options import check_epsilon
from jbn.nnx import BatchMoments
from jbn.tools._models import Layer, Path, Variables, batch_moments, batch_norms, moments_of, path_name
from jbn.tools._report.channels import LayerReport, measure_layer
from jbn.tools._report.table import Report

MomentsOf: TypeAlias = Mapping[str, Moments] | Mapping[Path, Moments] | Variables


@public
def report(variables: Variables, moments: MomentsOf | None = None, *, epsilon: float = 1e-5) -> Report:
    """A table of every batch norm of a model; with moments of a batch, why evaluation differs from training.

    y_run is y by the running statistics, as in evaluation, and y_batch by those of the batch, as in training.
    Per channel, with i_run = 1 / sqrt(var_run + epsilon) and i_batch = 1 / sqrt(var_batch + epsilon):

        mean drift     = (mean_run - mean_batch) * i_batch, in standard deviations of the batch
        variance drift = log2((var_run + epsilon) / (var_batch + epsilon))
        E[|y_run - y_batch|^2] = |scale|^2 * drift^2
        with drift^2 = var_batch * (i_run - i_batch)^2 + |mean_run - mean_batch|^2 * i_run^2

    because y_run - y_batch = scale * ((x - mean_batch) * (i_run - i_batch) + (mean_batch - mean_run) * i_run)
    and x - mean_batch averages to 0. A layer's drift is sqrt(sum(|scale|^2 * drift^2) / sum(|scale|^2)), with
    scale 1 where there is none: the root mean square difference of y, in standard deviations that y has in
    training. Above 0.5 a sentence below the table warns.

    A channel is dead if its output does not depend on the input: |scale| * sqrt(var / (var_run + epsilon)) is
    at most 1e-6 of the layer's largest |scale|, or sqrt(var) at most 1e-6 of |mean|. Here var and mean are
    those of the batch if known, else the running ones.

    - A batch of n independent rows has mean drifts of 1 / sqrt(n) by chance: merge enough of them.
    - Channels without rows (`count` 0) have no drift; NaN and inf are counted, and take no further part.
    - For layers with `debias=True` pass what `jbn.tools.debias` returns: they evaluate with that.
    - Of stacked layers (`nn.scan`, `nn.vmap`), with statistics [L, C], every one of the L * C is a channel.

    Args:
      variables: linen variables, or an NNX module.
      moments: a mapping from a batch norm's path, `"block/bn"` or `("block", "bn")`, to its `jbn.Moments`; or
        variables with `batch_moments`, which `apply(..., mutable=["batch_stats", "batch_moments"])` returns
        in training mode; or an NNX module after `jbn.nnx.keep_batch_moments` and training calls. Or the model
        with other statistics and no moments, as `jbn.tools.recalibrate` returns it: its mean and var then
        stand for those of a batch. None: those that `variables` holds, if it does. Layers that they leave
        out have no drift.
      epsilon: that of the layers.

    Returns:
      `Report`. Rows are in the order of their paths; if a drift is known, those with NaN or inf come first
      and then the largest drift.

    Raises:
      ValueError: no batch norm; moments of another model; traced or abstract arrays.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, jbn.linen, jbn.tools
      >>> params, batch_stats = jbn.init(2)
      >>> variables = {"params": {"bn": params}, "batch_stats": {"bn": batch_stats}}
      >>> x = jnp.array([[0.5, 2.0], [-1.5, 4.0]])
      >>> found = jbn.tools.report(variables, {"bn": jbn.moments(x)})  # of a batch
      >>> print(f"{found.rows[0].drift:.2f}", found.notes[0])
      2.15 1 of 1 layer was never updated: bn. Keep the batch_stats that training returns.
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return jbn.linen.BatchNorm(use_running_average=False, name="bn")(x)
      >>> population = jbn.tools.recalibrate(Net().apply, variables, [x, x + 1], progress=False)
      >>> print(f"{jbn.tools.report(variables, population).rows[0].drift:.2f}")  # of a stream
      2.48

    Reference: Wu and Johnson 2021, Rethinking "Batch" in BatchNorm, arXiv 2105.07576, section 3.
    """
    return make_report(variables, moments, epsilon)


def make_report(variables: Variables, moments: Any, epsilon: float) -> Report:
    """`report`, whose errors have no name yet: for `plot`, which makes one."""
    check_epsilon(epsilon)
    layers = batch_norms(variables)
    batches = _batches(variables, moments, layers)
    found = [
        measure_layer(path_name(path), layers[path], batches.get(path), epsilon)
        for path in sorted(layers, key=lambda path: _by_number(path_name(path)))
    ]
    if any(row.drift is not None for row, _ in found):
        found.sort(key=lambda pair: _worst_first(pair[0]))
    return Report(tuple(row for row, _ in found), tuple(channels for _, channels in found))


def _by_number(path: str) -> list[str | int]:
    """BatchNorm_10 after BatchNorm_2: trees come with their keys in alphabetical order."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def _worst_first(row: LayerReport) -> tuple[bool, float]:
    drift = -1.0 if row.drift is None else row.drift
    return not row.nonfinite, -np.inf if np.isnan(drift) else -drift


def _batches(variables: Variables, moments: Any, layers: Mapping[Path, Layer]) -> dict[Path, Moments]:
    """The moments by path, from any of the forms that `report` takes."""
    if moments is None:
        return moments_of(variables, layers) if batch_moments(variables, layers) else {}
    if _has_statistics_alone(moments):
        moments = {
            path: Moments(jnp.ones_like(stats["var"]), stats["mean"], stats["var"])
            for path, (_, stats) in batch_norms(moments).items()
        }
    return moments_of(moments, layers)


def _has_statistics_alone(model: Any) -> bool:
    """Whether it is a model with statistics and no moments."""
    if isinstance(model, nnx.Module):
        return not nnx.state(model, BatchMoments) and bool(nnx.state(model, nnx.BatchStat))
    return (
        isinstance(model, Mapping)
        and isinstance(model.get("batch_stats"), Mapping)
        and "batch_moments" not in model
    )
