"""What a training run shows: the axes of its curves, and progress in a terminal and in a log."""

import io
import sys

import numpy as np
import pytest

import curves
from progress import ProgressBar


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


def test_a_net_with_many_batch_norms_has_one_curve_of_their_largest_drift(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "save_picture", lambda figure, path: drawn.append(figure))
    file = curves.MetricsFile(tmp_path / "metrics.csv", last_step=0)
    for step in range(1, 7):
        ends = step % 3 == 0
        measured = {"test_accuracy": 0.1 * step, "drift": 1 / step} if ends else {}
        file.write({"step": step, "loss": 1.0, "test_accuracy": None, "drift": None} | measured)
    file.close()
    curves.draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes][2] == "largest drift of a batch norm"
    curve = figure.axes[2].get_lines()[0]
    np.testing.assert_allclose(curve.get_xydata(), [[3, 1 / 3], [6, 1 / 6]])


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def bar_shows(monkeypatch):
    """What a bar writes into a file that takes the place of stderr."""

    def shown(file, visible):
        monkeypatch.setattr(sys, "stderr", file)
        with ProgressBar("epoch 1", 10, visible=visible) as bar:
            bar.update(5)
            bar.show_loss(0.5)
        return file.getvalue()

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    return shown


def test_progress_on_a_terminal(bar_shows):
    found = bar_shows(Terminal(), visible=True)
    assert "epoch 1" in found
    assert "5/10" in found
    assert "loss 0.5" in found
    assert found.endswith("\x1b[2K")  # the line is cleared: what is printed next takes its place


@pytest.mark.parametrize(("file", "visible"), [(Terminal, False), (io.StringIO, True)])
def test_progress_is_for_terminals_alone(file, visible, bar_shows, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # colours may be asked for where there is no terminal, as in CI
    assert bar_shows(file(), visible) == ""
