"""The report as a picture."""

import sys

import numpy as np
import pytest

from jbn.tools import plot, report
from tests.support.report_models import BATCH, HEALTHY, VARIABLES, array, moments_of, variables_of


def drawn(figure):
    """The names of the layers, the titles, the units, and where the medians are."""
    first = figure.axes[0]
    names = [label.get_text() for label in first.get_yticklabels()]
    titles = [axes.get_title() for axes in figure.axes]
    medians = [
        [(line.get_ydata()[0], line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "o"]
        for axes in figure.axes
    ]
    return names, titles, [axes.get_xlabel() for axes in figure.axes], medians


def ticks_within(axes):
    low, high = axes.get_xlim()
    return [tick for tick in axes.get_xticks() if low <= tick <= high]


def remarks(figure):
    return [text.get_text() for text in figure.axes[-1].texts]


def test_picture_of_drift(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    far = moments_of(array(9.5, 7.0), array(8.0, 8.0))
    variables = variables_of(near=HEALTHY, far=HEALTHY, rest=HEALTHY)
    found = report(variables, {"near": BATCH, "far": far})
    figure = plot(found, path=tmp_path / "drift.png")
    names, titles, units, medians = drawn(figure)
    assert names == ["far", "near", "rest"]
    assert titles == ["running mean minus batch mean", "running variance over batch variance"]
    assert units == ["standard deviations of the batch", "log2 of the ratio: 1 is twice, -1 is half"]
    np.testing.assert_allclose(medians[0], [(0, -9 / np.sqrt(8)), (1, 0)], rtol=1e-5)
    np.testing.assert_allclose(medians[1], [(0, -3), (1, 0)], rtol=1e-4)
    assert remarks(figure) == [f"drift {found.rows[0].drift:.2f}", "drift 0.00", ""]
    assert figure.axes[0].get_ylim() == (2.5, -0.5)
    assert figure.get_suptitle().replace("\n", " ") == found.notes[0]
    assert "matplotlib.pyplot" not in sys.modules
    assert png_size(tmp_path / "drift.png") == (1560, round(130 * (2.2 + 3 * 0.26)))


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[1:4] == b"PNG"
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])


def test_every_channel_is_a_stroke():
    (axes, *_) = plot(VARIABLES, {"bn": moments_of(array(1.0, -2.0), HEALTHY[1])}).axes
    (strokes,) = (line for line in axes.lines if line.get_marker() == "|")
    np.testing.assert_allclose(strokes.get_xdata(), [-0.5 / np.sqrt(2), 0], rtol=1e-5)


def test_picture_of_ranges(tmp_path):
    variables = variables_of(
        bn_10=(array(1.0, 40.0), array(0.0, 4.0), array(1.0, -3.0)), bn_9=(array(np.nan), array(1.0))
    )
    figure = plot(variables, path=str(tmp_path / "ranges.png"))
    names, titles, units, medians = drawn(figure)
    assert names == ["bn_9", "bn_10"]
    assert titles == ["running mean", "running variance", "|scale|"]
    assert units == ["units of x", "units of x, squared", "units of y"]
    assert medians == [[(1, 20.5)], [(0, 1), (1, 4)], [(1, 2)]]
    assert remarks(figure) == ["1 of 1 NaN or inf", "1 of 2 dead"]
    assert [axes.get_xscale() for axes in figure.axes] == ["symlog", "log", "linear"]
    means, variances, scales = map(ticks_within, figure.axes)
    np.testing.assert_allclose(means, [1, 3, 10, 30])
    np.testing.assert_allclose(variances, [1, 2])
    assert len(scales) >= 4
    np.testing.assert_allclose(np.diff(scales), scales[1] - scales[0])
    assert png_size(tmp_path / "ranges.png")[0] == 1560


@pytest.mark.parametrize(
    ("worst", "seen"), [(7.41, [1, 2, 5]), (40.0, [1, 3, 10, 30]), (3e3, [1, 10, 100, 1000])]
)
def test_an_axis_of_means_has_ticks_beside_its_worst_value(worst, seen):
    """An axis from -8 to 8 with ticks at -1, 0 and 1 alone made 7.4 look like 1.8."""
    batch = moments_of(array(0.0), array(1.0))
    axes, _ = plot(variables_of(bn=(array(worst), array(1.0))), {"bn": batch}).axes
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    np.testing.assert_allclose(sorted(ticks), sorted([-tick for tick in seen] + [0.0] + seen))


def test_titles_where_nothing_is_wrong():
    assert plot(VARIABLES).get_suptitle() == "Running statistics and scale of 1 batch norm"
    assert plot(VARIABLES, {"bn": BATCH}).get_suptitle() == (
        "Running and batch statistics agree in 1 batch norm: at most 0.00 standard deviations of y apart"
    )


def test_fifty_layers_have_room_and_long_paths_are_cut():
    layers = {f"{'block' * 12}_{i}": HEALTHY for i in range(50)}
    figure = plot(variables_of(**layers))
    names, *_ = drawn(figure)
    assert len(names) == len(set(names)) == 50
    assert max(map(len, names)) == 43
    assert figure.get_figheight() >= 50 * 0.25


def test_signs_of_mathematics_in_paths_are_letters(tmp_path):
    figure = plot(variables_of(**{r"a$\foo$": (array(np.nan), array(1.0))}), path=tmp_path / "math.png")
    assert drawn(figure)[0] == [r"a$\foo$"]
    assert r"a$\foo$" in figure.get_suptitle()


def test_paths_of_pictures(tmp_path):
    plot(VARIABLES, path=tmp_path / "upper.PNG")
    plot(VARIABLES, path=tmp_path / "none")
    assert {file.name for file in tmp_path.iterdir()} == {"upper.PNG", "none.png"}
    with (tmp_path / "open").open("wb") as file:
        plot(VARIABLES, path=file)
    assert png_size(tmp_path / "open")[0] == 1560
