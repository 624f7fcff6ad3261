"""When recalibration stops, and the bar that shows how far it is."""

import numpy as np
import pytest

import jbn
import jbn.linen
import jbn.tools
from tests.support.recalibration import PARTS, X, linen

pytestmark = pytest.mark.usefixtures("flax_promotion")


@pytest.mark.parametrize(("progress", "terminal"), [(True, False), (False, True), (True, True)])
def test_a_bar_is_shown_where_there_is_a_terminal(progress, terminal, capfd, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    variables, train = linen()
    jbn.tools.recalibrate(train, variables, PARTS, progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("Recalibrating" in err) == (progress and terminal)
    assert bool(err) == (progress and terminal)


ROWS = np.random.default_rng(3).normal([0, 1000, 5], [1, 30, 0], (16, 16, 3))
STREAM = list(ROWS.astype(np.float32))


def batches_taken(**limits):
    """How many batches of `STREAM`, one channel of which is constant, a single layer takes."""
    layer, (params, batch_stats) = jbn.linen.BatchNorm(use_running_average=False), jbn.init(3)
    stream = iter(STREAM)
    variables = {"params": params, "batch_stats": batch_stats}
    jbn.tools.recalibrate(layer.apply, variables, stream, **limits)
    return len(STREAM) - len(list(stream))


def standard_error(number):
    """Of the worst mean after so many batches, in standard deviations of its channel."""
    seen = np.stack(STREAM[:number])[:, :, :2].astype(np.float64)
    errors = seen.mean(1).std(0, ddof=1) / np.sqrt(number)
    return (errors / seen.reshape(-1, 2).std(0)).max()


def test_it_stops_after_so_many_batches():
    assert batches_taken(max_batches=3) == 3
    assert batches_taken(max_batches=3, tolerance=0.0) == 3


def test_it_stops_at_an_accuracy():
    for number in (10, 12):
        limit = 1.0001 * standard_error(number)
        assert all(standard_error(fewer) > limit for fewer in range(8, number))
        assert batches_taken(tolerance=limit) == number
    assert batches_taken(tolerance=1.0) == 8


@pytest.mark.parametrize(("with_rows", "taken"), [(1, 20), (0, 8)])
def test_each_channel_counts_its_own_batches(with_rows, taken):
    """With rows in the first batch alone, no spread says how good a mean is; without any, there is none."""
    layer, seen = jbn.linen.BatchNorm(use_running_average=False), []

    def stream():
        for number in range(20):
            seen.append(None)
            yield np.tile(X[:8], (8, 1)), np.array([[number < with_rows, True, True]])

    def train(variables, batch, **options):
        return layer.apply(variables, batch[0], mask=batch[1], **options)

    variables = {"params": jbn.init(3)[0], "batch_stats": jbn.init(3)[1]}
    jbn.tools.recalibrate(train, variables, stream(), tolerance=0.1)
    assert len(seen) == taken


@pytest.mark.parametrize(("length", "most", "total"), [(3, None, 3), (3, 2, 2), (2, 9, 2), (None, 2, 2)])
def test_the_bar_ends_where_it_stops(monkeypatch, length, most, total):
    def track(_, batches, total=None, **__):
        seen.append(total)
        return batches

    seen, (variables, train) = [], linen()
    monkeypatch.setattr("rich.progress.Progress.track", track)
    batches = PARTS[:length] if length else iter(PARTS)
    jbn.tools.recalibrate(train, variables, batches, max_batches=most)
    assert seen == [total]


def test_what_batches_print_stays_where_it_was_printed(monkeypatch, capsys):
    """Also where the bar shows: it is on standard error, and standard output may be a file."""

    def stream():
        print("a batch")
        yield PARTS[0]

    variables, train = linen()
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    jbn.tools.recalibrate(train, variables, stream())
    shown = capsys.readouterr()
    assert shown.out == "a batch\n"
    assert "Recalibrating" in shown.err
