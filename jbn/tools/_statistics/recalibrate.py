"""Statistics of a data stream: moments of many batches, pooled exactly."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from operator import length_hint
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import Progress

from jbn._core.dtypes import promote_stats
from jbn._core.errors import describe, error, join_names, public, warn_user
from jbn._core.moments import Moments, checked_merge
from jbn._core.options import is_number
from jbn._core.running import saturated
from jbn._core.sharding import sharded_like
from jbn.tools._models import (
    Layer,
    Path,
    Variables,
    batch_norms,
    errors_at,
    join_paths,
    moments_in,
    path_name,
    with_values,
)
from jbn.tools._statistics.measuring import linen_step, nnx_step

Model = TypeVar("Model", bound=Variables)

# Merged in groups: a sum of as many, one at a time, would round as often.
_GROUP = 32


@public
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
    each layer's moments are pooled by count: unequal batches, masked batches and several devices weigh by
    their rows. The statistics that the model had before play no part, not even NaN: twice gives the same
    as once. The variance is biased.

    Args:
      apply_fn: for linen `apply_fn(variables, batch, mutable=[...])` in training mode, for example
        `lambda variables, x, **options: model.apply(variables, x, train=True, **options)`; for NNX
        `apply_fn(model, batch)`, which gets a copy of the model after `train()`, and in it the random state
        that the batch before left. It is compiled. For linen it returns (y, new variables), as `model.apply`
        does, for NNX anything. Batch norms of Flax are measured as those of jbn are, also in `nn.scan`,
        `nn.vmap` and `nnx.bridge.ToNNX`; `nnx.bridge.to_linen` is refused. Subclasses and copies of Flax's
        layer are measured under `replace_batch_norm(classes=...)`. A model of pure functions returns
        `(y, {"batch_moments": moments})`, a tree of `jbn.Moments` at the paths of `batch_stats`, as
        `jbn.batch_norm(..., return_moments=True)` gives them; its `apply_fn` need not take `mutable`.
      variables: linen variables, such a tree for pure functions, or an NNX module; not changed.
      batches: whatever `apply_fn` takes, one after the other. Sharded arrays are measured as a whole.
      max_batches: stop after so many, from 1 up.
      tolerance: stop when the standard error of every mean, estimated from the spread of the means of the
        batches that had rows for it, is at most so many standard deviations of its channel; after 8 batches
        at the earliest, and not before each channel that ran had rows in two of them.
      progress: whether a bar shows how far it is, on a terminal.

    Returns:
      A model of the same kind with new `mean` and `var`, in float32 or wider, and the mean complex where rows
      are. Where layers keep them, `rows` are those of the stream and `count` is 2^30, as after updates
      without end: there is nothing to debias. A layer that never ran keeps what it had, and so does all
      else, such as `batch_moments`.

    Raises:
      ValueError: no batch; a model without batch norm, or in which none had rows in training mode; arguments
        of the wrong kind; a call under `jit`.

    Warns:
      UserWarning: layers that never ran, layers of classes that are not measured, and layers with NaN or
        inf in their batches, all by name.

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
    layers = batch_norms(variables)
    _check(apply_fn, layers, batches, max_batches, tolerance)
    measure, unmeasured = (
        nnx_step(apply_fn, variables)
        if isinstance(variables, nnx.Module)
        else linen_step(apply_fn, variables)
    )
    pooled: list[dict[Path, Moments]] = []
    means: list[dict[Path, Moments]] = []  # of each batch, for the tolerance alone
    total = min((size for size in (length_hint(batches), max_batches) if size), default=None)
    with _progress(progress) as bar:
        stream = bar.track(islice(batches, max_batches), total=total, description="Recalibrating")
        for number, batch in enumerate(stream, 1):
            trees = measure(batch)
            found = {path: value for tree in trees for path, value in moments_in(tree, layers).items()}
            pooled = _merge_if_many([*pooled, found])
            if tolerance is not None:
                means = _merge_if_many([*means, {path: _as_one_row(m) for path, m in found.items()}])
                if number >= 8 and _largest_error(means, pooled) <= tolerance:
                    break
    if not pooled:
        raise error("batches", "empty", "one batch or more", "A generator gives its batches only once.")
    moments = _merge_layers(pooled)
    if unknown := [path_name(path) for path in moments if path not in layers]:
        raise error(
            "variables",
            f"a model without batch_stats for {join_paths(unknown)}",
            "those of every batch norm that runs",
            "Pass all variables of the model, as init or training returned them.",
        )
    any_rows = any(np.any(batch.count) for batch in moments.values())
    if unmeasured and not any_rows:
        raise error(
            "apply_fn",
            f"one with batch norms of {join_names(sorted({*unmeasured.values()}))}, which are not measured",
            "batch norms of Flax or jbn, and no subclasses or copies of them",
            _way_to_measure(variables, unmeasured),
        )
    if not any_rows:
        raise error(
            "apply_fn",
            "one in which no batch norm had rows in training mode",
            "a model in training mode",
            "Run it with use_running_average=False and frozen=False, and see that masks have rows. A model "
            "of pure functions returns (y, {'batch_moments': {path: moments}}), with the moments of "
            "jbn.batch_norm(..., return_moments=True), or runs the stream with momentum=None from "
            "jbn.init(features, count=True).",
        )
    _warn(variables, layers, moments, unmeasured)
    stats = {path: _replace_stats(layers[path], batch) for path, batch in moments.items()}
    new: Model = with_values(variables, batch_stats=stats)
    return new


def _progress(wanted: bool) -> Progress:
    """A bar on standard error, if that is a terminal; what batches print to standard output stays there."""
    console = Console(stderr=True)
    shown = wanted and console.is_terminal
    return Progress(console=console, disable=not shown, transient=True, redirect_stdout=False)


def _check(apply_fn: Any, layers: Any, batches: Any, max_batches: Any, tolerance: Any) -> None:
    """What would fail late, or not at all."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(layers)):
        fix = "Call it outside of jit, grad and scan: it compiles apply_fn by itself."
        raise error("variables", "traced", "arrays with values", fix)
    if not callable(apply_fn):
        expected = "a function that runs the model in training mode"
        fix = "Pass model.apply, or a function around it, and for NNX lambda model, x: model(x)."
        raise error("apply_fn", describe(apply_fn), expected, fix)
    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, str, np.ndarray, jax.Array)):
        got = "a dict" if isinstance(batches, Mapping) else describe(batches)
        fix = "Pass a list or a generator; for a single batch, [batch]."
        raise error("batches", got, "batches, one after the other", fix)
    every = "None takes all batches."
    whole = isinstance(max_batches, (int, np.integer)) and max_batches >= 1
    if not (max_batches is None or whole):
        raise error("max_batches", repr(max_batches), "an integer from 1 up", every)
    if not (tolerance is None or (is_number(tolerance) and tolerance >= 0)):
        raise error("tolerance", repr(tolerance), "a number from 0 up", every)


def _way_to_measure(variables: Variables, unmeasured: Mapping[Path, str]) -> str:
    """How batch norms of other classes become ours."""
    classes = f"classes=({', '.join(sorted({*unmeasured.values()}))},)"
    if isinstance(variables, nnx.Module):
        return f"Call jbn.nnx.replace_batch_norm(model, {classes}) before."
    return f"Call it inside of a `with jbn.linen.replace_batch_norm({classes}):`."


def _warn(
    variables: Variables,
    layers: Iterable[Path],
    moments: Mapping[Path, Moments],
    unmeasured: Mapping[Path, str],
) -> None:
    """Of layers whose statistics are not what the caller wants."""
    ran = [path for path in layers if path in moments and np.any(moments[path].count)]
    others = [path_name(path) for path in layers if path not in ran and path in unmeasured]
    if others:
        warn_user(
            f"jbn.tools.recalibrate: the old statistics stay in {join_paths(others, len(others))}, whose "
            f"classes are not measured. {_way_to_measure(variables, unmeasured)}"
        )
    never = [path_name(path) for path in layers if path not in ran and path not in unmeasured]
    if never:
        warn_user(
            f"jbn.tools.recalibrate: {join_paths(never, len(never))} never ran in training mode, so the old "
            "statistics stay there. Does apply_fn run the whole model in training mode, with nothing frozen?"
        )
    broken = [
        path_name(path)
        for path in ran
        if not (np.isfinite(moments[path].mean).all() and np.isfinite(moments[path].var).all())
    ]
    if broken:
        warn_user(
            "jbn.tools.recalibrate: the moments of the batches hold NaN or inf in "
            f"{join_paths(broken, len(broken))}. Look for NaN in the data, and for layers before these that "
            "give it."
        )


def _replace_stats(layer: Layer, moments: Moments) -> dict[str, jax.Array]:
    """Mean, var and rows of the moments, where there are rows; nothing is left of initial statistics."""
    stats = promote_stats(layer.batch_stats, moments.mean)
    for name, given in (("mean", moments.mean), ("var", moments.var), ("rows", moments.count)):
        if name in stats:
            old = stats[name]
            seen, new = (sharded_like(part, old) for part in (moments.count > 0, given))
            stats[name] = jnp.where(seen, new.astype(old.dtype), old)
    if "count" in stats:  # one of each layer, if layers are stacked
        count = stats["count"]
        ran = jnp.any(moments.count > 0, tuple(range(count.ndim, moments.count.ndim)))
        stats["count"] = jnp.where(ran, saturated(count), count)
    return stats


def _merge_layers(parts: list[dict[Path, Moments]]) -> dict[Path, Moments]:
    merged = {}
    for path in dict.fromkeys(path for part in parts for path in part):
        with errors_at(path):
            merged[path] = checked_merge([part[path] for part in parts if path in part])
    return merged


def _merge_if_many(parts: list[dict[Path, Moments]]) -> list[dict[Path, Moments]]:
    """The same moments in few parts."""
    return [_merge_layers(parts)] if len(parts) > _GROUP else parts


def _as_one_row(moments: Moments) -> Moments:
    """The mean of a batch as a row: pooled, these have the spread of the means as their variance."""
    seen = (moments.count > 0).astype(moments.count.dtype)
    return Moments(seen, moments.mean, jnp.zeros_like(moments.var))


def _largest_error(means: list[dict[Path, Moments]], pooled: list[dict[Path, Moments]]) -> float:
    """The largest standard error of a mean, in standard deviations of its channel.

    Constant channels have 0, those that one batch alone had rows for have inf: it has no spread.
    """
    spread, population = _merge_layers(means), _merge_layers(pooled)
    errors = []
    for path, moments in population.items():
        batches, squares = (np.asarray(part, np.float64) for part in (spread[path].count, spread[path].var))
        var = np.asarray(moments.var, np.float64)
        known = (var > 0) & (batches > 1)
        relative = np.divide(squares, var * (batches - 1), out=np.zeros_like(var), where=known)
        errors.append(np.where(batches == 1, np.inf, np.sqrt(relative)).max(initial=0.0))
    return float(max(errors, default=0.0))
