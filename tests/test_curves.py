"""What a training run shows: the axes of its curves, and progress in a terminal and in a log."""

import io
import sys

import numpy as np
import pytest

import curves
from progress import progress_bar


@pytest.fixture
def figure(tmp_path, monkeypatch):
    """The curves of a run of one epoch."""
    drawn = []
    monkeypatch.setattr(curves, "save_picture", lambda figure, path: drawn.append(figure))
    file = curves.MetricsFile(tmp_path / "metrics.csv", last_step=0)
    layer = curves.percentile_columns({"BatchNorm_0": {"mean": np.zeros(3), "var": np.ones(3)}})
    for step in range(20, 480, 20):
        accuracy = 0.98 if step == 460 else ""
        file.write({"step": step, "loss": 1 / step, "test_accuracy": accuracy} | layer)
    file.close()
    curves.draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    return drawn[0]


def test_after_one_epoch_no_accuracy_is_above_1_and_steps_begin_at_0(figure):
    (axes,) = (axes for axes in figure.axes if "accuracy" in axes.get_title())
    low, high = axes.get_ylim()
    assert 0.9 < low < 0.98
    assert high == 1.0
    ticks = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    assert ticks == [0, 100, 200, 300, 400, 500]


def test_the_smoothing_is_named(figure):
    (axes,) = (axes for axes in figure.axes if "loss" in axes.get_title())
    batches, smooth = axes.get_lines()
    assert smooth.get_label() == "mean of the last 2 of them"
    assert smooth.get_ydata()[5] == pytest.approx(sum(batches.get_ydata()[4:6]) / 2)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("file", "visible", "shown"),
    [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)],
)
def test_progress_is_for_terminals_alone(file, visible, shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", file())
    with progress_bar("epoch 1", 10, visible=visible) as bar:
        bar.update(5)
        bar.set_postfix(loss=0.5)
    assert ("epoch 1" in sys.stderr.getvalue()) == bool(sys.stderr.getvalue()) == shown
