"""What the batch norms of a model hold, as a table: ranges, dead channels, and how far evaluation is off.

Arrays come to the host once and are float64 from there on; nothing is traced.
"""

import csv
import dataclasses
import io
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path as File
from typing import Any, TextIO, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta
from jaxtyping import Bool, Float

from jbn._checks import check_settings, error
from jbn._moments import Moments
from jbn._types import describe
from jbn.tools._trees import Layer, Path, Variables, batch_moments, batch_norms, dotted

MomentsOf: TypeAlias = Mapping[str, Moments] | Mapping[Path, Moments] | Variables

FAR = 0.5
"""Standard deviations of y: a drift above it is told."""

_CALL = "tools.report"
_WIDTH = 100
# Sixteen roundings of float32: what is left of a constant, or of a scale beside the layer's largest.
_NEGLIGIBLE = 1e-6
_FINITE = "Go back to statistics that are finite."
_KEEP = "Keep the batch_stats that training returns."
_DIFFERENCE = (
    "by more than half a standard deviation between running and batch statistics: evaluation will be worse "
    "than training. Run jbn.tools.recalibrate, lower momentum, or check that evaluation data is preprocessed "
    "as training data."
)
_DEAD = "the output does not depend on the input."
_LEGEND = (
    "drift: root mean square of y by running less y by batch statistics, in standard deviations of y; "
    "mean drift, in standard deviations of the batch, and log2 variance: worst channel / median."
)
_FORMS = "a mapping from path to jbn.Moments, or variables or an NNX module with batch_moments"
_TRAIN = (
    "Run the model in training mode: linen with mutable=['batch_stats', 'batch_moments'], NNX after "
    "jbn.nnx.keep_batch_moments(model)."
)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One batch norm. `report` says what the numbers are; ranges are over finite values.

    Attributes:
      path: such as `"block/bn"`; empty if the model is one batch norm.
      channels: C, or L * C if L layers are stacked.
      updates: what `count` says, the smallest of stacked layers; None without a `count`.
      never_updated: whether `count` is 0 or, without one, every mean is 0 and every var 1.
      dead: the number of dead channels.
      nonfinite: the number of channels with a value, or 1 / sqrt(var + epsilon), that is NaN or inf.
      mean_min: of the running mean, here and below by absolute value if it is complex.
      mean_max: of the running mean.
      var_min: of the running variance.
      var_max: of the running variance.
      scale_min: of |scale|; None without scale.
      scale_max: of |scale|; None without scale.
      drift: of y, in standard deviations; None without moments, NaN if no channel is finite.
      mean_drift_max: of |mean drift|, the worst channel.
      mean_drift_median: of |mean drift|, over channels.
      var_drift_max: of |variance drift|, the worst channel.
      var_drift_median: of |variance drift|, over channels.
    """

    path: str
    channels: int
    updates: int | None
    never_updated: bool
    dead: int
    nonfinite: int
    mean_min: float
    mean_max: float
    var_min: float
    var_max: float
    scale_min: float | None
    scale_max: float | None
    drift: float | None
    mean_drift_max: float | None
    mean_drift_median: float | None
    var_drift_max: float | None
    var_drift_median: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one batch norm, f64[C] or bool[C]: NaN where not known. `report` has the formulas."""

    mean: Float[np.ndarray, "C"]
    var: Float[np.ndarray, "C"]
    scale: Float[np.ndarray, "C"] | None
    mean_drift: Float[np.ndarray, "C"]
    var_drift: Float[np.ndarray, "C"]
    drift: Float[np.ndarray, "C"]
    dead: Bool[np.ndarray, "C"]
    nonfinite: Bool[np.ndarray, "C"]


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """Every batch norm of a model: `print` shows it in 100 columns.

    Attributes:
      rows: one `LayerReport` per batch norm, worst first if a drift is known.
      channels: for each row the values that it sums up.
    """

    rows: tuple[LayerReport, ...]
    channels: tuple[Channels, ...] = dataclasses.field(compare=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is wrong, in sentences; empty if nothing is."""
        dead, channels = (sum(getattr(row, name) for row in self.rows) for name in ("dead", "channels"))
        broken = [row.path for row in self.rows if row.nonfinite]
        new = [row.path for row in self.rows if row.never_updated]
        far = [row.path for row in self.rows if row.drift is not None and row.drift > FAR]
        told = {
            f"{self._layers(broken, 'has', 'have')} NaN or inf: {_some(broken)}. {_FINITE}": broken,
            f"{self._layers(new, 'was', 'were')} never updated: {_some(new)}. {_KEEP}": new,
            f"{self._layers(far, 'differs', 'differ')} {_DIFFERENCE}": far,
            f"{dead} of {channels} channels {'is' if dead == 1 else 'are'} dead: {_DEAD}": dead,
        }
        return tuple(note for note, wrong in told.items() if wrong)

    def to_csv(self, file: str | os.PathLike[str] | TextIO | None = None) -> str:
        """The rows as CSV, one column per attribute of `LayerReport`; what is None is empty.

        Args:
          file: a path, or an open text file, that gets the text too.

        Returns:
          The text.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(LayerReport))
        writer.writerows(dataclasses.astuple(row) for row in self.rows)
        if isinstance(file, (str, os.PathLike)):
            File(file).write_text(text.getvalue(), encoding="utf-8", newline="")
        elif file is not None:
            file.write(text.getvalue())
        return text.getvalue()

    def __str__(self) -> str:
        return "\n\n".join([*_tables(self.rows), *(textwrap.fill(note, _WIDTH) for note in self.notes)])

    __repr__ = __str__

    def _layers(self, paths: Sequence[str], one: str, many: str) -> str:
        plural = "s" if len(self.rows) > 1 else ""
        return f"{len(paths)} of {len(self.rows)} layer{plural} {one if len(paths) == 1 else many}"


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
    check_settings(_CALL, 0.0, epsilon, None, [np.zeros((), np.float32)])
    layers = dict(sorted(batch_norms(_CALL, variables).items(), key=_by_number))
    batches = _batches(variables, moments, [dotted(path) for path in layers])
    found = [
        _layer(dotted(path), layer, batches.get(dotted(path)), epsilon) for path, layer in layers.items()
    ]
    if any(row.drift is not None for row, _ in found):
        found.sort(key=lambda pair: _worst_first(pair[0]))
    return Report(tuple(row for row, _ in found), tuple(channels for _, channels in found))


def _by_number(item: tuple[Path, Layer]) -> list[str | int]:
    """BatchNorm_10 behind BatchNorm_2: trees come with their keys in alphabetical order."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", dotted(item[0]))]


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
        got, expected = f"one with {_some(unknown)}", f"paths of batch norms: {_some(paths)}"
        raise error(_CALL, "moments", got, expected, "Take moments and variables from the same model.")
    return named


def _layer(path: str, layer: Layer, batch: Moments | None, epsilon: float) -> tuple[LayerReport, Channels]:
    """A row of the table, and what it sums up."""
    stats = {name: layer.batch_stats[name] for name in ("mean", "var", "count") if name in layer.batch_stats}
    given = meta.unbox(stats | layer.params)
    given |= {} if batch is None else {f"batch {name}": value for name, value in vars(batch).items()}
    host = {name: _host(f"{name} of {path!r}", value) for name, value in given.items()}
    count = host.pop("count", None)
    values = _aligned(path, host)
    with np.errstate(all="ignore"):
        channels = _channels(values, epsilon)
    fresh = channels.var.size > 0 and not channels.mean.any() and bool((channels.var == 1).all())
    row = LayerReport(
        path,
        channels.var.size,
        None if count is None else int(count.min()),
        fresh if count is None else bool(count.min() == 0),
        int(channels.dead.sum()),
        int(channels.nonfinite.sum()),
        *_span(channels.mean),
        *_span(channels.var),
        *((None, None) if channels.scale is None else _span(channels.scale)),
        *_drifts(channels, known=bool(values.get("batch count", np.zeros(1)).any())),
    )
    return row, channels


def _host(argument: str, value: Any) -> np.ndarray:
    """The value as float64 or complex128."""
    try:
        array = np.asarray(value)
    except TypeError:  # traced arrays, and keys
        array = np.asarray(None)
    if not jnp.issubdtype(array.dtype, jnp.number):
        got = f"{'traced ' if isinstance(value, jax.core.Tracer) else ''}{describe(value)}"
        fix = "Call it outside of jit, grad and scan, and not on what eval_shape returns."
        raise error(_CALL, argument, got, "an array of numbers that can be read", fix)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _aligned(path: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All arrays of a layer as [C]: of one shape, or some of them shared by layers that are stacked."""
    shape = max((array.shape for array in arrays.values()), key=len)
    for name, array in arrays.items():
        if shape[len(shape) - array.ndim :] != array.shape:
            got, expected = f"of shape {array.shape}", f"{shape}, or the last axes of it, as for the others"
            fix = "Take moments and variables from the same model."
            raise error(_CALL, f"{name} of {path!r}", got, expected, fix)
    return {name: np.broadcast_to(array, shape).ravel() for name, array in arrays.items()}


def _channels(values: Mapping[str, np.ndarray], epsilon: float) -> Channels:
    """The formulas of `report`, per channel."""
    mean, var = values["mean"], values["var"].real
    rows, batch_mean, batch_var = (values.get(f"batch {n}", np.zeros(1)) for n in ("count", "mean", "var"))
    known = np.broadcast_to(rows != 0, var.shape)
    scale = np.abs(values["scale"]) if "scale" in values else None
    inverse, batch_inverse = _inverse_deviation(var, epsilon), _inverse_deviation(batch_var, epsilon)
    offset = mean - batch_mean
    drift = np.sqrt(batch_var * (inverse - batch_inverse) ** 2 + np.abs(offset * inverse) ** 2)
    mean_drift = (np.abs(offset) if np.iscomplexobj(offset) else offset) * batch_inverse
    ratio = np.where(var == batch_var, 1, (var + epsilon) / (batch_var + epsilon))
    nonfinite = ~np.isfinite(sum(values.values()) + inverse + np.where(known, drift, 0))
    good = known & ~nonfinite
    gain = np.ones_like(var) if scale is None else scale
    data_mean, data_var = np.where(known, batch_mean, mean), np.where(known, batch_var, var)
    largest = gain.max(initial=0, where=np.isfinite(gain))
    silent = gain * np.sqrt(data_var) * inverse <= _NEGLIGIBLE * largest
    constant = np.sqrt(data_var) <= _NEGLIGIBLE * np.abs(data_mean)
    return Channels(
        mean=np.abs(mean) if np.iscomplexobj(mean) else mean,
        var=var,
        scale=scale,
        mean_drift=np.where(good, mean_drift, np.nan),
        var_drift=np.where(good, np.log2(ratio), np.nan),
        drift=np.where(good, drift, np.nan),
        dead=(silent | constant) & ~nonfinite,
        nonfinite=nonfinite,
    )


def _inverse_deviation(var: np.ndarray, epsilon: float) -> np.ndarray:
    """1 / sqrt(var + epsilon), and 0 where both are 0, as the layers have it."""
    square = var + epsilon
    return np.where(square == 0, 0, 1 / np.sqrt(square))


def _span(values: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest finite value."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (np.nan, np.nan)


def _drifts(channels: Channels, known: bool) -> tuple[float | None, ...]:
    """The drift of a layer, then the worst and the median channel of mean and variance."""
    if not known:
        return (None,) * 5
    seen = ~np.isnan(channels.drift)
    if not seen.any():
        return (np.nan,) * 5
    weights = (np.ones_like(channels.var) if channels.scale is None else channels.scale**2)[seen]
    square = (weights * channels.drift[seen] ** 2).sum()
    drift = np.sqrt(square / weights.sum()) if weights.any() else 0.0
    parts = [np.abs(part[seen]) for part in (channels.mean_drift, channels.var_drift)]
    return float(drift), *(float(kind(part)) for part in parts for kind in (np.max, np.median))


def _some(paths: Sequence[str]) -> str:
    """The first few paths, for people."""
    named = [path or "the model itself" for path in paths[:4]]
    return ", ".join([*named, f"and {len(paths) - 4} more"] if len(paths) > 4 else named)


def _tables(rows: Sequence[LayerReport]) -> list[str]:
    """One table, or two if there is a drift to tell."""
    about = {
        "channels": [str(row.channels) for row in rows],
        "updates": [
            "never" if row.never_updated else "" if row.updates is None else str(row.updates) for row in rows
        ],
    }
    wrong = {
        "dead": [str(row.dead) for row in rows],
        "non-finite": [str(row.nonfinite or "") for row in rows],
    }
    ranges = {
        "mean": [_range(row.mean_min, row.mean_max) for row in rows],
        "var": [_range(row.var_min, row.var_max) for row in rows],
        "|scale|": [_range(row.scale_min, row.scale_max) for row in rows],
    }
    paths = [row.path or "." for row in rows]
    if all(row.drift is None for row in rows):
        return [_table(paths, about | ranges | wrong)]
    drifts = {
        "drift": [_fixed(row.drift) for row in rows],
        "mean drift": [_pair(row.mean_drift_max, row.mean_drift_median) for row in rows],
        "log2 var": [_pair(row.var_drift_max, row.var_drift_median) for row in rows],
    }
    return [_table(paths, about | drifts | wrong), textwrap.fill(_LEGEND, _WIDTH), _table(paths, ranges)]


def _table(paths: Sequence[str], columns: Mapping[str, list[str]]) -> str:
    """Aligned to the right behind the paths, which break into lines if they are too long; no empty column."""
    filled = {head: [head, *cells] for head, cells in columns.items() if any(cells)}
    sizes = [max(map(len, cells)) for cells in filled.values()]
    room = max(16, _WIDTH - sum(sizes) - 2 * len(sizes))
    names = [textwrap.wrap(path, room) for path in ("layer", *paths)]
    size = max(len(line) for name in names for line in name)
    lines = []
    for (first, *more), *cells in zip(names, *filled.values(), strict=True):
        parts = [cell.rjust(width) for cell, width in zip(cells, sizes, strict=True)]
        lines += ["  ".join([first.ljust(size), *parts]).rstrip(), *more]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    """Two digits, or all of an integer; nothing for None."""
    if value is None:
        return ""
    text = f"{value:.0f}" if 100 <= abs(value) < 1e5 else f"{value + 0.0:.2g}"
    return text.replace("e+0", "e").replace("e-0", "e-")


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None else f"{_number(low)}..{_number(high)}"


def _fixed(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 1e3 else _number(value)


def _pair(worst: float | None, median: float | None) -> str:
    return "" if worst is None else f"{_fixed(worst)} / {_fixed(median)}"
