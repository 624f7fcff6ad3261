"""Statistics of a data stream, and of micro-batches: moments of many batches, pooled exactly."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from rich.progress import track

from jbn._checks import error
from jbn._moments import Moments, merge
from jbn._running import update
from jbn.linen import replace_batch_norm
from jbn.nnx import BatchMoments, keep_batch_moments
from jbn.nnx import replace_batch_norm as replace_nnx
from jbn.tools._trees import Path, Variables, batch_moments, batch_norms, collections, dotted, rebuilt

Model = TypeVar("Model", bound=Variables)

# Merged in groups: a sum of as many, one at a time, would round as often.
_GROUP = 32


def recalibrate(
    apply_fn: Callable[..., Any],
    variables: Model,
    batches: Iterable[Any],
    *,
    max_batches: int | None = None,
    tolerance: float | None = None,
    progress: bool = True,
) -> Model:
    """Population statistics of a data stream for every batch norm of a model (precise batch norm).

        mean = sum(n_i mean_i) / n,  var = sum(n_i (var_i + (mean_i - mean)^2)) / n

    The model runs in training mode, so that each layer sees what the layers before it give in training, and
    each layer's moments are pooled by count: unequal batches, masked ones and several devices weigh as their
    rows do. The statistics that the model had before play no part: twice gives the same as once. The
    variance is biased.

    Args:
      apply_fn: for linen `apply_fn(variables, batch, mutable=[...])` in training mode, for example
        `lambda variables, x, **options: model.apply(variables, x, train=True, **options)`; for NNX
        `apply_fn(model, batch)`, which gets a copy of the model after `train()`. It is compiled, and what it
        returns is not looked at. Batch norms of Flax are measured as those of jbn are.
      variables: linen variables or an NNX module; not changed.
      batches: whatever `apply_fn` takes, one after the other. Sharded arrays are measured as a whole.
      max_batches: stop after so many.
      tolerance: stop when the standard error of every mean, estimated from the spread of the batches' means,
        is at most so many standard deviations of its channel; after 8 batches at the earliest.
      progress: whether a bar shows how far it is, on a terminal.

    Returns:
      A model of the same kind with new `mean` and `var`. A layer that never ran keeps what it had.

    Raises:
      ValueError: no batch, or a model without batch norm.

    Warns:
      UserWarning: layers that never ran, all by name.

    Example:
      >>> import jax.numpy as jnp, jbn, jbn.linen, jbn.tools
      >>> layer, (params, batch_stats) = jbn.linen.BatchNorm(use_running_average=False), jbn.init(1)
      >>> batches = [jnp.array([[0.0], [1], [2], [3]]), jnp.array([[10.0], [12]])]
      >>> variables = {"params": params, "batch_stats": batch_stats}
      >>> new = jbn.tools.recalibrate(layer.apply, variables, batches, progress=False)
      >>> print(new["batch_stats"]["mean"].round(2), new["batch_stats"]["var"].round(2))
      [4.67] [21.22]

    Reference: Wu and Johnson 2021, arXiv 2105.07576, section 3.
    """
    call = "tools.recalibrate"
    layers = batch_norms(call, variables)
    measure = (
        _nnx_step(apply_fn, variables)
        if isinstance(variables, nnx.Module)
        else _linen_step(apply_fn, variables)
    )
    pooled: list[dict[Path, Moments]] = []
    means: list[dict[Path, Moments]] = []  # of each batch, for the tolerance alone
    console = Console(stderr=True)
    shown = progress and console.is_terminal
    bar = track(batches, "Recalibrating", console=console, disable=not shown, transient=True)
    for number, batch in enumerate(bar, 1):
        found = batch_moments(call, {"batch_moments": measure(batch)})
        pooled = _grouped([*pooled, found])
        if number == max_batches:
            break
        if tolerance is not None:
            means = _grouped([*means, {path: _as_one_row(m) for path, m in found.items()}])
            if number >= 8 and _largest_error(means, pooled, number) <= tolerance:
                break
    if not pooled:
        raise error(call, "batches", "empty", "one batch or more", "A generator gives its batches only once.")
    moments = _merged(pooled)
    if never := [dotted(path) for path in layers if path not in moments or not np.any(moments[path].count)]:
        warnings.warn(
            f"jbn.tools.recalibrate: {', '.join(never)} never ran in training mode, and keep their "
            "statistics. Does apply_fn run the model in training mode, and are they frozen?",
            stacklevel=2,
        )
    return apply_moments(variables, moments, momentum=0.0)


def apply_moments(variables: Model, moments: Any = None, *, momentum: float | jax.Array = 0.99) -> Model:
    """One update of every batch norm by moments of its batch, whatever micro-batches it came in.

        new = momentum * old + (1 - momentum) * batch

    This is how gradients are accumulated over K micro-batches with one update of the statistics, that of the
    whole batch: call the model with `update_batch_stats=False`, or drop its `batch_stats`, keep
    `batch_moments` from call to call, in which each layer merges what it sees, and apply them once at the
    end. (Each micro-batch is still normalized by itself.)

    Args:
      variables: linen variables or an NNX module; not changed.
      moments: variables with the collection `batch_moments`, as `model.apply` returns them or an NNX model
        after `jbn.nnx.keep_batch_moments`; or a mapping from path (a tuple) to `jbn.Moments`; None: those in
        variables.
      momentum: from 0 (the batch replaces the old) to 1; may be a traced scalar.

    Returns:
      A model of the same kind with new `batch_stats`. Layers without moments, or with no rows in them, keep
      theirs.

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
    call = "tools.apply_moments"
    layers = batch_norms(call, variables)
    source: Any = variables if moments is None else moments
    by_path = source if _is_by_path(source) else batch_moments(call, source)
    if not by_path:
        raise error(
            call,
            "moments",
            "empty",
            "the moments of one layer or more",
            "Name the collection, apply(..., mutable=['batch_moments']), or call "
            "jbn.nnx.keep_batch_moments(model) before training.",
        )
    if foreign := [dotted(path) for path in by_path if path not in layers]:
        raise error(
            call,
            "moments",
            f"those of {', '.join(foreign)}",
            f"layers of the model ({', '.join(map(dotted, layers))})",
            "Pass the variables of the model that was measured.",
        )
    stats = flatten_dict(collections(call, variables)["batch_stats"])
    for path, batch in by_path.items():
        new_stats = update(layers[path].batch_stats, batch, momentum=momentum)
        stats |= {(*path, name): value for name, value in new_stats.items()}
    new: Model = rebuilt(variables, batch_stats=unflatten_dict(stats))
    return new


def _is_by_path(moments: Any) -> bool:
    return isinstance(moments, dict) and all(isinstance(value, Moments) for value in moments.values())


def _linen_step(apply_fn: Callable[..., Any], variables: Any) -> Callable[[Any], Any]:
    """A function from a batch to the tree of its moments."""

    @jax.jit
    def step(variables: Any, batch: Any) -> Any:
        _, new = apply_fn(variables, batch, mutable=["batch_stats", "batch_moments"])
        return new.get("batch_moments", {})

    start = {name: tree for name, tree in variables.items() if name != "batch_moments"}

    def measure(batch: Any) -> Any:
        with replace_batch_norm():
            return step(start, batch)

    return measure


def _nnx_step(apply_fn: Callable[..., Any], model: nnx.Module) -> Callable[[Any], Any]:
    """The same for an NNX module."""
    copy = replace_nnx(nnx.clone(model))
    copy.train()
    keep_batch_moments(copy)
    graph, state = nnx.split(copy)

    @jax.jit
    def step(state: Any, batch: Any) -> Any:
        model = nnx.merge(graph, state)
        apply_fn(model, batch)
        return nnx.state(model, BatchMoments)

    return lambda batch: nnx.to_pure_dict(step(state, batch))


def _merged(parts: list[dict[Path, Moments]]) -> dict[Path, Moments]:
    paths = dict.fromkeys(path for part in parts for path in part)
    return {path: merge(*(part[path] for part in parts if path in part)) for path in paths}


def _grouped(parts: list[dict[Path, Moments]]) -> list[dict[Path, Moments]]:
    """The same moments in few parts."""
    return [_merged(parts)] if len(parts) > _GROUP else parts


def _as_one_row(moments: Moments) -> Moments:
    """The mean of a batch as a row: pooled, these have the spread of the means as their variance."""
    seen = (moments.count > 0).astype(moments.count.dtype)
    return Moments(seen, moments.mean, jnp.zeros_like(moments.var))


def _largest_error(means: list[dict[Path, Moments]], pooled: list[dict[Path, Moments]], number: int) -> float:
    """The largest standard error of a mean, in standard deviations of its channel; constant ones have 0."""
    spread, population = _merged(means), _merged(pooled)
    errors = []
    for path, moments in population.items():
        var = np.asarray(moments.var, np.float64)
        squares = np.asarray(spread[path].var, np.float64) / (number - 1)
        errors.append(
            np.sqrt(np.divide(squares, var, out=np.zeros_like(var), where=var > 0)).max(initial=0.0)
        )
    return float(max(errors, default=0.0))
