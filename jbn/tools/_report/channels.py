"""What one batch norm holds: ranges, dead channels, and how far evaluation is off.

Arrays come to the host once and are float64 from there on; nothing is traced.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jbn._core.errors import describe, error
from jbn._core.moments import Moments
from jbn.tools._models import Layer

FAR = 0.5
"""Standard deviations of y: a drift above it is told."""

# Sixteen roundings of float32: what is left of a constant, or of a scale beside the layer's largest.
_NEGLIGIBLE = 1e-6


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One batch norm. `report` says what the numbers are; ranges are over finite values.

    Attributes:
      path: such as `"block/bn"`; empty if the model is one batch norm.
      channels: C, or L * C if L layers are stacked.
      updates: what `count` says, the smallest of stacked layers; 2^30 after `recalibrate`; None without a
        `count`.
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

    Example:
      >>> import jbn, jbn.tools
      >>> params, batch_stats = jbn.init(2)
      >>> row = jbn.tools.report({"params": params, "batch_stats": batch_stats}).rows[0]
      >>> print(row.channels, row.never_updated, row.var_max, row.drift)
      2 True 1.0 None
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

    @property
    def is_far(self) -> bool:
        """Whether its evaluation is off, or cannot be known: a drift above half a deviation, NaN or inf."""
        return bool(self.nonfinite) or (self.drift is not None and not self.drift <= FAR)


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


def measure_layer(
    path: str, layer: Layer, batch: Moments | None, epsilon: float
) -> tuple[LayerReport, Channels]:
    """A row of the table, and what it sums up."""
    stats = {name: layer.batch_stats[name] for name in ("mean", "var", "count") if name in layer.batch_stats}
    given = stats | layer.params
    given |= {} if batch is None else {f"batch {name}": value for name, value in vars(batch).items()}
    host = {name: _to_host(_argument_name(path, name), value) for name, value in given.items()}
    count = host.pop("count", None)
    values = _align_channels(path, host)
    with np.errstate(all="ignore"):
        channels = _measure_channels(values, epsilon)
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


def _argument_name(path: str, name: str) -> str:
    """An array of a layer in errors."""
    return f"{name} of {path!r}" if path else name


def _to_host(argument: str, value: Any) -> np.ndarray:
    """The value as float64 or complex128."""
    try:
        array = np.asarray(value)
    except TypeError:  # traced arrays, and keys
        array = np.asarray(None)
    if not jnp.issubdtype(array.dtype, jnp.number):
        got = f"{'traced ' if isinstance(value, jax.core.Tracer) else ''}{describe(value)}"
        fix = "Call it outside of jit, grad and scan, and not on what eval_shape returns."
        raise error(argument, got, "an array of numbers that can be read", fix)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _align_channels(path: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All arrays of a layer as [C]: of one shape, or some of them shared by layers that are stacked."""
    shape = max((array.shape for array in arrays.values()), key=len)
    for name, array in arrays.items():
        if shape[len(shape) - array.ndim :] != array.shape:
            got, expected = f"of shape {array.shape}", f"{shape}, or the last axes of it, as for the others"
            fix = "Take moments and variables from the same model."
            raise error(_argument_name(path, name), got, expected, fix)
    return {name: np.broadcast_to(array, shape).ravel() for name, array in arrays.items()}


def _measure_channels(values: Mapping[str, np.ndarray], epsilon: float) -> Channels:
    """The formulas of `report`, per channel."""
    mean, var = values["mean"], values["var"].real
    rows, batch_mean, batch_var = (values.get(f"batch {n}", np.zeros(1)) for n in ("count", "mean", "var"))
    known = np.broadcast_to(rows != 0, var.shape)
    scale = np.abs(values["scale"]) if "scale" in values else None
    inverse, batch_inverse = _inverse_std(var, epsilon), _inverse_std(batch_var, epsilon)
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


def _inverse_std(var: np.ndarray, epsilon: float) -> np.ndarray:
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
