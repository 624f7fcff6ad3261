"""The report as a picture: one line per layer, and on it every channel."""

import os
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jbn._core.errors import error, public
from jbn.tools._models import Variables
from jbn.tools._report.channels import Channels, LayerReport
from jbn.tools._report.report import MomentsOf, make_report
from jbn.tools._report.table import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DARK, _GOOD, _FAR, _BAND = "#222222", "#0072b2", "#d55e00", "#e8e8e8"  # blue and orange: Okabe and Ito
_WIDTH, _LINE, _REST = 12.0, 0.26, 2.2  # inches: all, one layer, and what is above and below the layers
_LETTERS = 145  # that fit into the width
_LONGEST = 44  # letters of a path
_LEGEND = "A stroke is a channel, the dot the median, the dark line the middle half of the channels. "
_DRIFT_LEGEND = (
    "Gray: within half a standard deviation, within a factor of two. Drift: in standard deviations of y."
)
_RANGE_LEGEND = "Variances of 0 are not drawn."


class _Panel(NamedTuple):
    """What one column of the picture shows; `band` is what is still near 0, where 0 is right."""

    title: str
    unit: str
    values: Callable[[Channels], np.ndarray | None]
    scale: str = "linear"
    band: float = 0.0


_DRIFT = (
    _Panel(
        "running mean minus batch mean",
        "standard deviations of the batch",
        lambda channels: channels.mean_drift,
        "symlog",
        0.5,
    ),
    _Panel(
        "running variance over batch variance",
        "log2 of the ratio: 1 is twice, -1 is half",
        lambda channels: channels.var_drift,
        band=1.0,
    ),
)
_RANGES = (
    _Panel("running mean", "units of x", lambda channels: channels.mean, "symlog"),
    _Panel("running variance", "units of x, squared", lambda channels: channels.var, "log"),
    _Panel("|scale|", "units of y", lambda channels: channels.scale),
)


@public
def plot(
    model: Report | Variables,
    moments: MomentsOf | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    epsilon: float = 1e-5,
) -> "Figure":
    """Draws a report: a line per layer, every channel a stroke on it, the median a dot, worst layer on top.

    With moments of a batch the left panel shows mean drift and the right one variance drift, both as in
    `report`, and a layer is orange where its drift is above 0.5. Without moments there are three panels: the
    running mean, the running variance and |scale|. Sentences above the panels say what is wrong,
    as those below the printed report do.

    An axis of means that goes beyond 5 is linear from -1 to 1 and logarithmic outside, so that one layer that
    is far off leaves the others legible.

    Args:
      model: a `Report`, linen variables, or an NNX module.
      moments: as for `report`; None if model is a `Report`, which has them.
      path: where to save a picture, such as `"drift.png"`.
      epsilon: that of the layers; a `Report` has it.

    Returns:
      The figure. It belongs to no window: nothing needs to be closed, and no display is needed.

    Raises:
      ValueError: matplotlib is not installed or cannot write such a file, moments for a `Report`, and what
        `report` raises.

    Example:
      >>> import jax.numpy as jnp, jbn.tools
      >>> params, batch_stats = jbn.init(2)
      >>> variables = {"params": {"bn": params}, "batch_stats": {"bn": batch_stats}}
      >>> batch = jbn.moments(jnp.array([[0.5, 2.0], [-1.5, 4.0]]))
      >>> figure = jbn.tools.plot(variables, {"bn": batch})
      >>> [axes.get_title() for axes in figure.axes]
      ['running mean minus batch mean', 'running variance over batch variance']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fix = "Install it: pip install 'jbn[examples]', or pip install matplotlib."
        raise error("matplotlib", "not installed", "it for a picture", fix) from None
    if isinstance(model, Report) and moments is not None:
        fix = "Pass the variables, or make the report with the moments."
        raise error("moments", "given beside a report", "None, for a report has its own", fix)
    _check_path(path)
    found = model if isinstance(model, Report) else make_report(model, moments, epsilon)
    known = any(row.drift is not None for row in found.rows)
    shown = [panel for panel in _RANGES if any(panel.values(each) is not None for each in found.channels)]
    panels = _DRIFT if known else shown
    figure = Figure(figsize=(_WIDTH, _REST + _LINE * len(found.rows)), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=True):
        _draw(axes, panel, found)
    _name_layers(grid[0], found.rows)
    _annotate_layers(grid[-1], found.rows)
    title = "\n".join(
        textwrap.fill(note, _LETTERS) for note in found.notes or (_title_where_fine(found, known),)
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_DARK, parse_math=False)
    legend = _LEGEND + (_DRIFT_LEGEND if known else _RANGE_LEGEND)
    figure.supxlabel(legend, x=0.01, ha="left", fontsize=9, color=_DARK)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _check_path(path: Any) -> None:
    """None, an open file, or a path whose ending, if any, matplotlib knows: before anything is drawn."""
    from matplotlib.backend_bases import FigureCanvasBase

    if path is None or callable(getattr(path, "write", None)):
        return
    known = isinstance(path, (str, os.PathLike))
    ending = os.path.splitext(path)[1].lower() if known else ""
    if not known or (ending and ending[1:] not in FigureCanvasBase.get_supported_filetypes()):
        expected = "the path of a picture that matplotlib can write"
        raise error("path", repr(path), expected, "For example 'drift.png'.")


def _title_where_fine(found: Report, known: bool) -> str:
    """The title where nothing is wrong."""
    worst = max((row.drift for row in found.rows if row.drift is not None), default=0.0)
    layers = f"{len(found.rows)} batch norm{'s' if len(found.rows) > 1 else ''}"
    if not known:
        return f"Running statistics and scale of {layers}"
    return (
        f"Running and batch statistics agree in {layers}: at most {worst:.2f} standard deviations of y apart"
    )


def _draw(axes: "Axes", panel: _Panel, found: Report) -> None:
    """One panel: a line of strokes for each layer."""
    largest = panel.band * 1.5
    for place, (row, channels) in enumerate(zip(found.rows, found.channels, strict=True)):
        values = panel.values(channels)
        values = np.array([]) if values is None else values[np.isfinite(values)]
        values = values[values > 0] if panel.scale == "log" else values
        if values.size:
            _draw_layer(axes, place, values, _FAR if row.is_far else _GOOD)
            largest = max(largest, 1.05 * float(np.abs(values).max()))
    if panel.band:
        axes.axvspan(-panel.band, panel.band, color=_BAND, zorder=0)
        axes.axvline(0, color=_DARK, linewidth=0.8, zorder=1)
        axes.set_xlim(-largest, largest)
    _set_scale(axes, panel.scale if panel.scale == "log" or largest > 5 else "linear")
    axes.set_title(panel.title, fontsize=11, color=_DARK)
    axes.set_xlabel(panel.unit, color=_DARK)
    axes.tick_params(colors=_DARK)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=_BAND, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_layer(axes: "Axes", place: int, values: np.ndarray, color: str) -> None:
    low, middle, high = np.percentile(values, (25, 50, 75))
    axes.plot(values, np.full(values.size, place), "|", color=color, markersize=8, alpha=0.5, rasterized=True)
    axes.plot([low, high], [place, place], color=_DARK, linewidth=2, solid_capstyle="butt")
    axes.plot(middle, place, "o", color="white", markeredgecolor=_DARK, markersize=5)


def _set_scale(axes: "Axes", scale: str) -> None:
    """The scale, with ticks in plain numbers, and enough of them where they span few decades."""
    from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

    axes.set_xscale(scale, **({"linthresh": 1.0} if scale == "symlog" else {}))
    low, high = axes.get_xlim()
    locator: Locator = MaxNLocator(7)
    if scale == "log":
        locator = LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,))
    elif scale == "symlog":
        largest = max(-low, high)
        subs = (1.0, 2.0, 5.0) if largest < 20 else (1.0, 3.0) if largest < 1000 else (1.0,)
        locator = SymmetricalLogLocator(linthresh=1.0, base=10.0, subs=subs)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")


def _name_layers(axes: "Axes", rows: Sequence[LayerReport]) -> None:
    axes.set_yticks(
        range(len(rows)), [_shorten(row.path or ".") for row in rows], fontsize=9, parse_math=False
    )
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _shorten(path: str) -> str:
    half = (_LONGEST - 3) // 2
    return path if len(path) <= _LONGEST else f"{path[:half]}...{path[-half:]}"


def _annotate_layers(axes: "Axes", rows: Sequence[LayerReport]) -> None:
    """To the right of each layer: its drift, and what is wrong in it."""
    for place, row in enumerate(rows):
        parts = [f"drift {row.drift:.2f}"] if row.drift is not None else []
        parts += [f"{row.dead} of {row.channels} dead"] if row.dead else []
        parts += [f"{row.nonfinite} of {row.channels} NaN or inf"] if row.nonfinite else []
        parts += ["never updated"] if row.never_updated else []
        axes.annotate(
            ", ".join(parts),
            (1, place),
            (6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_DARK,
            fontweight="bold" if row.is_far else "normal",
        )
