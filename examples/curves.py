"""The record of a training run: a table in metrics.csv, and its curves as a picture."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from chex import ArrayTree
from flax.traverse_util import flatten_dict
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import LABEL, save_picture

PERCENTILES = (10, 50, 90)
_COLORS = {"mean": "tab:blue", "var": "tab:red"}


class MetricsFile:
    """Rows of one training run, each written through to the disk at once.

    The columns are `step`, `epoch`, `loss` (of that step's batch), `learning_rate`, `test_accuracy` (where
    an epoch ends, else empty), and of the batch norms either percentiles over channels of every one's running
    statistics or, for nets that have dozens, the largest `drift` of evaluation from training.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        """Keeps the rows up to `last_step`; later ones a resumed run writes again."""
        rows = [row for row in read_metrics(path) if int(row["step"]) <= last_step] if path.exists() else []
        unfinished = path.with_suffix(".tmp")
        self._file = unfinished.open("w", newline="")
        self._writer = None
        for row in rows:
            self.write(row)
        os.replace(unfinished, path)

    def write(self, row: Mapping[str, object]) -> None:
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, fieldnames=list(row), lineterminator="\n")
            self._writer.writeheader()
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file, less a last one that a killed program left unfinished."""
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def percentile_columns(batch_stats: ArrayTree) -> dict[str, float]:
    """The spread over channels of running statistics: `{"BatchNorm_0/mean/p10": ..., ...}`."""
    columns = {}
    for name, values in flatten_dict(batch_stats, sep="/").items():
        for percent, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True):
            columns[f"{name}/p{percent}"] = float(value)
    return columns


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draws loss and test accuracy, and beside or below them what is known of the batch norms."""
    rows = read_metrics(metrics)
    if not rows:
        return
    columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
    if "drift" in columns:
        figure = Figure(figsize=(13.0, 3.8), layout="constrained")
        loss_axes, accuracy_axes, drift_axes = figure.subplots(1, 3)
        _draw_loss(loss_axes, columns)
        _draw_accuracy(accuracy_axes, columns)
        _draw_drift(drift_axes, columns)
    else:
        figure = _draw_with_statistics(columns)
    save_picture(figure, picture)


def _draw_with_statistics(columns: Mapping[str, np.ndarray]) -> Figure:
    """Below loss and accuracy, how the running statistics of each batch norm move."""
    layers = list(dict.fromkeys(name.split("/mean/")[0] for name in columns if "/mean/" in name))
    figure = Figure(figsize=(3.0 * max(len(layers), 3), 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2, 3))
    loss_axes, accuracy_axes = above.subplots(1, 2)
    _draw_loss(loss_axes, columns)
    _draw_accuracy(accuracy_axes, columns)
    grid = below.subplots(2, len(layers), squeeze=False, sharex=True)
    for layer, axes_pair in zip(layers, grid.T, strict=True):
        for statistic, axes in zip(("mean", "var"), axes_pair, strict=True):
            _draw_statistic(axes, columns, layer, statistic)
    below.suptitle("running statistics of each batch norm, over its channels")
    below.supxlabel("step")
    return figure


def _draw_loss(axes: Axes, columns: Mapping[str, np.ndarray]) -> None:
    steps, loss = columns["step"], columns["loss"]
    axes.plot(steps, loss, color="0.8", linewidth=1, label="single batches")
    width = max(2, len(loss) // 20)
    smooth = [loss[max(0, i + 1 - width) : i + 1].mean() for i in range(len(loss))]
    axes.plot(steps, smooth, color="tab:blue", label=f"mean of the last {width} of them")
    axes.legend(frameon=False, fontsize="small")
    axes.set(title="training loss", xlabel="step", yscale="log")


def _draw_accuracy(axes: Axes, columns: Mapping[str, np.ndarray]) -> None:
    measured = np.isfinite(columns["test_accuracy"])
    steps, accuracy = columns["step"][measured], columns["test_accuracy"][measured]
    axes.plot(steps, accuracy, "o-", color="tab:green")
    shown = 0 if len(steps) <= 6 else -1  # more labels would cover each other: the last one alone
    for step, value in zip(steps[shown:], accuracy[shown:], strict=True):
        axes.annotate(f"{value:.4f}", (step, value), (5, -12), **LABEL)
    # From one point alone matplotlib would make an axis of a few steps, and of accuracies above 1.
    if len(steps):
        axes.set(xlim=(0, 1.15 * steps[-1]), ylim=(accuracy.min() - 0.2 * (1.01 - accuracy.min()), 1.0))
    axes.set(title="test accuracy after each epoch", xlabel="step")


def _draw_drift(axes: Axes, columns: Mapping[str, np.ndarray]) -> None:
    measured = np.isfinite(columns["drift"])
    axes.plot(columns["step"][measured], columns["drift"][measured], "o-", color="tab:red")
    axes.axhline(0.5, color="0.8", linewidth=1)
    axes.annotate(
        "evaluation suffers above", (0, 0.5), (2, 3), xycoords=("axes fraction", "data"), color="0.5", **LABEL
    )
    axes.set(
        title="largest drift of a batch norm", xlabel="step", ylabel="standard deviations", ylim=(0, None)
    )


def _draw_statistic(axes: Axes, columns: Mapping[str, np.ndarray], layer: str, statistic: str) -> None:
    low, middle, high = (columns[f"{layer}/{statistic}/p{percent}"] for percent in PERCENTILES)
    color = _COLORS[statistic]
    axes.fill_between(columns["step"], low, high, color=color, alpha=0.2, linewidth=0)
    axes.plot(columns["step"], middle, color=color)
    for percent, values in zip(PERCENTILES, (low, middle, high), strict=True):
        label = "median" if percent == 50 else f"{percent} %"
        axes.annotate(label, (columns["step"][-1], values[-1]), (2, 0), va="center", **LABEL)
    kind = "variance" if statistic == "var" else "mean"
    axes.set_title(f"{layer}: running {kind}", fontsize="medium")
