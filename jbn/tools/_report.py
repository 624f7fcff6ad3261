"""A report on every batch norm of a model, and why its evaluation differs from training."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from flax import nnx

from jbn._checks import check_epsilon, error
from jbn._moments import Moments
from jbn.tools._drift import LayerReport, measured
from jbn.tools._table import Report, some
from jbn.tools._trees import Path, Variables, batch_moments, batch_norms, dotted

MomentsOf: TypeAlias = Mapping[str, Moments] | Mapping[Path, Moments] | Variables

_CALL = "tools.report"
_FORMS = "a mapping from path to jbn.Moments, or variables or an NNX module with batch_moments"
_TRAIN = (
    "Run the model in training mode: linen with mutable=['batch_stats', 'batch_moments'], NNX after "
    "jbn.nnx.keep_batch_moments(model)."
)


def report(variables: Variables, moments: MomentsOf | None = None, *, epsilon: float = 1e-5) -> Report:
    """A table of every batch norm of a model; with moments of a batch, why evaluation differs from training.

    y_run is y by the running statistics, as in evaluation, and y_batch by those of the batch, as in training.
    Per channel, with rows of mean and variance `batch`, i_run = 1 / sqrt(var_run + epsilon), i_batch alike:

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
    - Of stacked layers (`nn.scan`, `nn.vmap`), with statistics [L, C], every one of the L * C is a channel.

    Args:
      variables: linen variables, or an NNX module.
      moments: a mapping from a batch norm's path, `"block/bn"` or `("block", "bn")`, to its `jbn.Moments`; or
        variables with `batch_moments`, which `apply(..., mutable=["batch_stats", "batch_moments"])` returns
        in training mode; or an NNX module after `jbn.nnx.keep_batch_moments` and training calls. None: those
        that `variables` holds, if it does. Layers that they leave out have no drift.
      epsilon: that of the layers.

    Returns:
      `Report`. Rows are in the order of their paths; if a drift is known, those with NaN or inf come first
      and then the largest drift.

    Raises:
      ValueError: no batch norm, moments of another model, traced or abstract arrays.

    Example:
      >>> import jax.numpy as jnp, jbn.tools
      >>> params, batch_stats = jbn.init(2)
      >>> variables = {"params": {"bn": params}, "batch_stats": {"bn": batch_stats}}
      >>> batch = jbn.moments(jnp.array([[0.5, 2.0], [-1.5, 4.0]]))
      >>> found = jbn.tools.report(variables, {"bn": batch})
      >>> print(f"{found.rows[0].drift:.2f}", found.notes[0])
      2.15 1 of 1 layer was never updated: bn. Keep the batch_stats that training returns.

    Reference: Wu and Johnson 2021, Rethinking "Batch" in BatchNorm, arXiv 2105.07576, section 3.
    """
    check_epsilon(_CALL, epsilon)
    layers = [(dotted(path), layer) for path, layer in batch_norms(_CALL, variables).items()]
    layers.sort(key=lambda item: _by_number(item[0]))
    batches = _batches(variables, moments, [path for path, _ in layers])
    found = [measured(_CALL, path, layer, batches.get(path), epsilon) for path, layer in layers]
    if any(row.drift is not None for row, _ in found):
        found.sort(key=lambda pair: _worst_first(pair[0]))
    return Report(tuple(row for row, _ in found), tuple(channels for _, channels in found))


def _by_number(path: str) -> list[str | int]:
    """BatchNorm_10 behind BatchNorm_2: trees come with their keys in alphabetical order."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def _worst_first(row: LayerReport) -> tuple[bool, float]:
    drift = -1.0 if row.drift is None else row.drift
    return not row.nonfinite, -np.inf if np.isnan(drift) else -drift


def _batches(variables: Variables, moments: Any, paths: Sequence[str]) -> dict[str, Moments]:
    """The moments by path, from any of the forms that `report` takes."""
    holds = isinstance(moments, nnx.Module) or (isinstance(moments, Mapping) and "batch_moments" in moments)
    if moments is None or holds:
        found: Mapping[Any, Any] = batch_moments(_CALL, variables if moments is None else moments)
    else:
        found = moments if isinstance(moments, Mapping) else {}
    if (moments is not None and not found) or not all(isinstance(value, Moments) for value in found.values()):
        got = f"a mapping with {', '.join(map(str, found)) or 'nothing'}"
        if moments is not None and not isinstance(moments, Mapping):
            got = f"a {type(moments).__name__} without batch_moments"
        raise error(_CALL, "moments", got, _FORMS, _TRAIN)
    named = {path if isinstance(path, str) else dotted(path): value for path, value in found.items()}
    if unknown := [path for path in named if path not in paths]:
        got, expected = f"one with {some(unknown)}", f"paths of batch norms: {some(paths)}"
        raise error(_CALL, "moments", got, expected, "Take moments and variables from the same model.")
    return named
