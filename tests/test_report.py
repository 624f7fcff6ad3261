"""The report on a model's batch norms: its numbers, its order, its text, and its picture."""

import csv
import io
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import jbn
import jbn.linen
import jbn.nnx
import jbn.tools
from jbn.tools import plot, report
from jbn.tools._report import LayerReport
from tests.cases import assert_close


def array(*values, dtype=np.float32):
    return np.array(values, dtype)


def variables_of(**layers):
    """Linen variables of these layers, each given as its mean, var and perhaps scale."""
    stats = {name: {"mean": mean, "var": var} for name, (mean, var, *_) in layers.items()}
    params = {name: {"scale": scale[0]} for name, (_, _, *scale) in layers.items() if scale}
    return {"params": params, "batch_stats": stats}


def moments_of(mean, var, count=None):
    return jbn.Moments(np.full_like(var, 8) if count is None else count, mean, var)


HEALTHY = (array(0.5, -2.0), array(2.0, 0.5), array(1.0, 0.5))
BATCH = moments_of(*HEALTHY[:2])
VARIABLES = variables_of(bn=HEALTHY)


def only(found):
    (row,) = found.rows
    return row


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jbn.linen.BatchNorm(False, name="last")(jbn.linen.BatchNorm(False, name="first")(x) * x)


class NNXNet(nnx.Module):
    def __init__(self):
        self.first, self.last = (jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(2))

    def __call__(self, x):
        return self.last(self.first(x) * x)


def trained_linen(x):
    """The variables after one step, the moments of its batch among them."""
    variables = LinenNet().init(jax.random.key(0), x)
    _, new = LinenNet().apply(variables, x, mutable=["batch_stats", "batch_moments"])
    return {**variables, **new}


def trained_nnx(x):
    model = NNXNet()
    jbn.nnx.keep_batch_moments(model)
    model(x)
    return model


X = np.random.default_rng(0).normal(1.0, 3.0, (16, 3)).astype(np.float32)


def test_drift_has_the_values_of_its_formulas():
    variables = variables_of(bn=(array(0.0, 3.0), array(1.0, 4.0), array(1.0, -2.0)))
    found = report(variables, {"bn": moments_of(array(1.0, 1.0), array(4.0, 1.0))}, epsilon=0.0)
    assert only(found) == LayerReport(
        path="bn",
        channels=2,
        updates=None,
        never_updated=False,
        dead=0,
        nonfinite=0,
        mean_min=0.0,
        mean_max=3.0,
        var_min=1.0,
        var_max=4.0,
        scale_min=1.0,
        scale_max=2.0,
        drift=pytest.approx(np.sqrt((1 * (4 / 4 + 1) + 4 * (1 / 4 + 1)) / (1 + 4))),
        mean_drift_max=2.0,
        mean_drift_median=1.25,
        var_drift_max=2.0,
        var_drift_median=2.0,
    )
    np.testing.assert_array_equal(found.channels[0].mean_drift, [-0.5, 2.0])
    np.testing.assert_array_equal(found.channels[0].var_drift, [-2.0, 2.0])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", [np.float64, np.complex128])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("epsilon", [1e-5, 0.7])
def test_drift_is_what_evaluation_and_training_differ_by(kind, scaled, epsilon):
    """Not in expectation alone: for the very rows whose moments are given."""
    rng = np.random.default_rng(1)
    x = rng.normal(rng.normal(size=5), rng.uniform(0.3, 3.0, 5), (50, 5)).astype(kind)
    x = x * (1 + 2j) if kind == np.complex128 else x
    x[:, 4] = 2.5
    scale = rng.normal(size=5) if scaled else np.ones(5)
    params = {"scale": scale} if scaled else {}
    stats = {"mean": rng.normal(size=5).astype(kind), "var": rng.uniform(0.1, 4.0, 5)}
    y_run, y_batch = (
        jbn.batch_norm(params, stats, x, use_running_average=mode, epsilon=epsilon)[0]
        for mode in (True, False)
    )
    expected = np.sqrt(np.mean(np.abs(y_run - y_batch) ** 2) / np.mean(scale**2))
    variables = {"params": {"bn": params}, "batch_stats": {"bn": stats}}
    found = report(variables, {"bn": jbn.moments(x)}, epsilon=epsilon)
    assert expected > 0.1
    assert only(found).drift == pytest.approx(expected, rel=1e-9)
    channels = np.sqrt(np.mean(np.abs(y_run - y_batch) ** 2, 0)) / np.abs(scale)
    assert_close(found.channels[0].drift, channels, 1e-9)


def test_without_variance_and_epsilon_the_layer_is_its_bias():
    """There y is bias by running and by batch statistics alike, and no number is lost to 0 / 0."""
    constant = variables_of(bn=(array(1.0), array(0.0), array(2.0)))
    found = only(report(constant, {"bn": moments_of(array(3.0), array(0.0))}, epsilon=0.0))
    assert (found.drift, found.mean_drift_max, found.var_drift_max, found.nonfinite) == (0.0, 0.0, 0.0, 0)


def test_a_scale_of_zero_hides_every_difference():
    variables = variables_of(bn=(array(1.0), array(1.0), array(0.0)))
    found = only(report(variables, {"bn": moments_of(array(5.0), array(1.0))}))
    assert found.drift == 0.0
    assert found.mean_drift_max == pytest.approx(4.0, rel=1e-5)


def test_linen_and_nnx_say_the_same_however_moments_come():
    variables, model = trained_linen(X), trained_nnx(X)
    without = {name: tree for name, tree in variables.items() if name != "batch_moments"}
    batches = {name: layer["moments"] for name, layer in variables["batch_moments"].items()}
    rows = report(variables).rows
    assert [row.path for row in rows] == ["last", "first"]
    assert all(row.drift > 0.5 for row in rows)
    for found in (
        report(without, variables),
        report(freeze(without), freeze(variables)),
        report(without, batches),
        report(without, {(name,): value for name, value in batches.items()}),
        report(model),
        report(model, model),
        report(model, batches),
        report(without, model),
    ):
        assert found.rows == rows


def test_layers_are_sorted_worst_first():
    near, far = moments_of(array(0.6, -2.0), HEALTHY[1]), moments_of(array(9.0, -2.0), HEALTHY[1])
    broken = (array(np.nan, -2.0), *HEALTHY[1:])
    layers = {"bn_2": HEALTHY, "bn_10": HEALTHY, "bn_9": broken, "bn_1": HEALTHY, "bn_3": broken}
    moments = {
        "bn_2": near,
        "bn_10": far,
        "bn_3": near,
        "bn_9": moments_of(array(np.inf, np.inf), HEALTHY[1]),
    }
    found = report(variables_of(**layers), moments)
    assert [row.path for row in found.rows] == ["bn_9", "bn_3", "bn_10", "bn_2", "bn_1"]
    assert np.isnan(found.rows[0].drift)
    assert found.rows[-1].drift is None


def test_without_moments_layers_are_in_the_order_of_paths():
    """By number: a tree that jax.jit returned has its keys in alphabetical order."""
    found = report(variables_of(bn_10=HEALTHY, bn_9=(array(np.nan), array(1.0)), a=HEALTHY, bn_2=HEALTHY))
    assert [row.path for row in found.rows] == ["a", "bn_2", "bn_9", "bn_10"]
    assert {row.drift for row in found.rows} == {None}


DEAD = {
    "scale 0": (array(1.0, 1.0), array(1.0, 1.0), array(1.0, 0.0)),
    "tiny scale": (array(1.0, 1.0), array(1.0, 1.0), array(50.0, -4e-5)),
    "variance 0": (array(1.0, 0.0), array(1.0, 0.0), array(1.0, 1.0)),
    "tiny beside epsilon": (array(1.0, 0.0), array(1.0, 1e-18), array(1.0, 1.0)),
    "tiny beside the mean": (array(1.0, 1e5), array(1.0, 9e-3), array(1.0, 1.0)),
    "no scale, variance 0": (array(1.0, 0.0), array(1.0, 0.0)),
}


@pytest.mark.parametrize("layer", DEAD.values(), ids=DEAD)
def test_dead_channels_are_found(layer):
    found = report(variables_of(bn=layer))
    assert found.channels[0].dead.tolist() == [False, True]
    assert only(found).dead == 1


def test_small_channels_are_not_dead():
    layer = array(1.0, 1.0, 0.0, 1e4), array(1.0, 1.0, 1e-15, 1.0), array(10.0, 1e-4, 1.0, 1.0)
    assert only(report(variables_of(bn=layer))).dead == 0


def test_a_channel_is_dead_where_the_batch_is_constant():
    """Long before the running variance has come down to 0; and alive where the batch varies again."""
    variables = variables_of(bn=(array(3.0, 3.0, 3.0), array(1.0, 1.0, 0.0)))
    batch = moments_of(array(3.0, 3.0, 3.0), array(1.0, 0.0, 1.0))
    assert report(variables, {"bn": batch}).channels[0].dead.tolist() == [False, True, False]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["mean", "var", "scale", "bias", "batch mean", "batch var", "batch count"])
def test_nonfinite_channels_are_counted_and_left_out(where, value):
    variables = variables_of(bn=(array(1.0, 2.0, 3.0), array(1.0, 2.0, 3.0), array(1.0, 2.0, 3.0)))
    variables["params"]["bn"]["bias"] = array(0.0, 0.0, 0.0)
    batch = moments_of(array(0.0, 0.0, 0.0), array(1.0, 1.0, 1.0))
    parts = {**variables["params"]["bn"], **variables["batch_stats"]["bn"]}
    parts |= {f"batch {name}": part for name, part in vars(batch).items()}
    two = jax.tree.map(lambda part: part[[0, 2]], (variables, {"bn": batch}))
    parts[where][1] = value
    found, without = report(variables, {"bn": batch}), report(*two)
    assert found.channels[0].nonfinite.tolist() == [False, True, False]
    for name in (
        "drift",
        "mean_drift_max",
        "mean_drift_median",
        "var_drift_max",
        "var_drift_median",
        "var_max",
    ):
        assert getattr(only(found), name) == getattr(only(without), name)
    assert only(found).nonfinite == 1
    assert only(found).dead == 0
    assert found.notes[0] == "1 of 1 layer has NaN or inf: bn. Go back to statistics that are finite."


def test_a_negative_variance_counts_as_not_finite():
    assert only(report(variables_of(bn=(array(0.0, 1.0), array(-1.0, 2.0))))).nonfinite == 1


def test_channels_without_rows_have_no_drift():
    model = NNXNet()
    jbn.nnx.keep_batch_moments(model)
    assert {row.drift for row in report(model).rows} == {None}
    some = moments_of(array(0.5, 7.0), array(2.0, 0.0), count=array(8.0, 0.0))
    found = report(VARIABLES, {"bn": some})
    assert only(found).drift == 0.0
    assert np.isnan(found.channels[0].mean_drift[1])
    assert only(found).dead == 0


def test_updates_and_layers_that_were_never_updated():
    variables = variables_of(new=(array(0.0, 0.0), array(1.0, 1.0)), old=HEALTHY, other=HEALTHY)
    variables["batch_stats"]["old"] |= {"count": np.int32(7), "rows": array(56.0, 56.0)}
    variables["batch_stats"]["other"]["count"] = np.array([3, 0], np.int32)
    found = report(variables)
    assert [row.updates for row in found.rows] == [None, 7, 0]
    assert [row.never_updated for row in found.rows] == [True, False, True]
    assert found.notes == (
        "2 of 3 layers were never updated: new, other. Keep the batch_stats that training returns.",
    )


def test_stacked_layers_are_as_many_channels():
    rng = np.random.default_rng(3)
    mean, scale = rng.normal(size=(2, 4, 3)).astype(np.float32)
    var, batch_var = rng.uniform(0.5, 2.0, (2, 4, 3)).astype(np.float32)
    stacked = report(variables_of(bn=(mean, var, scale)), {"bn": moments_of(scale, batch_var)})
    flat = variables_of(bn=(mean.ravel(), var.ravel(), scale.ravel()))
    assert stacked.rows == report(flat, {"bn": moments_of(scale.ravel(), batch_var.ravel())}).rows
    shared = report(variables_of(bn=(mean, var, scale[0])), {"bn": moments_of(scale, batch_var)})
    tiled = variables_of(bn=(mean, var, np.tile(scale[0], (4, 1))))
    assert shared.rows == report(tiled, {"bn": moments_of(scale, batch_var)}).rows


def test_scanned_layers():
    def body(layer, x, _):
        return layer(x) * 2, None

    collections = dict.fromkeys(("params", "batch_stats", "batch_moments"), 0)
    net = nn.scan(body, variable_axes=collections, split_rngs={"params": True}, length=4)
    apply = nn.apply(
        lambda layer, x: net(layer, x, None)[0], jbn.linen.BatchNorm(False), mutable=[*collections]
    )
    variables = nn.init(lambda layer, x: net(layer, x, None)[0], jbn.linen.BatchNorm(False))(
        jax.random.key(0), X
    )
    _, new = apply(variables, X)
    row = only(report(variables, new))
    assert (row.path, row.channels) == ("", 12)
    assert row.drift > 0.5


def test_complex_means_count_by_absolute_value():
    layer = array(3 + 4j, -1j, dtype=np.complex64), array(1.0, 1.0)
    row = only(
        report(variables_of(bn=layer), {"bn": moments_of(array(0j, 0j, dtype=np.complex64), layer[1])})
    )
    assert (row.mean_min, row.mean_max) == (1.0, 5.0)
    assert row.mean_drift_max == pytest.approx(5.0, rel=1e-5)


def test_bfloat16_and_partitioned_parameters():
    scale = nn.Partitioned(jnp.array([1.5, -0.25], jnp.bfloat16), names=("c",))
    row = only(report(variables_of(bn=(*HEALTHY[:2], scale))))
    assert (row.scale_min, row.scale_max) == (0.25, 1.5)


def test_csv_comes_back_as_the_rows(tmp_path):
    variables = variables_of(old=HEALTHY, bare=(array(0.1), array(1e-30)), broken=(array(np.nan), array(1.0)))
    variables["batch_stats"]["old"]["count"] = np.int32(7)
    found = report(variables, {"old": moments_of(array(0.1, 0.2), HEALTHY[1])})
    text = found.to_csv()
    read = list(csv.DictReader(io.StringIO(text, newline="")))
    kinds = LayerReport.__annotations__
    assert [set(line) for line in read] == [set(kinds)] * 3
    for line, row in zip(read, found.rows, strict=True):
        for name, kind in kinds.items():
            value = getattr(row, name)
            wanted = "" if value is None else str(value) if kind in (str, bool) else value
            got = line[name] if value is None or kind in (str, bool) else float(line[name])
            assert got == wanted or (np.isnan(got) and np.isnan(wanted)), name
    found.to_csv(tmp_path / "a.csv")
    with (tmp_path / "b.csv").open("w", newline="", encoding="utf-8") as file:
        assert found.to_csv(file) == text
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes() == text.encode()


SMALL = variables_of(
    block=(array(-0.0, -0.0, -0.0), array(1.0, 1.0, 1.0), array(1.0, -0.5, 0.0)),
    last=(array(-12.5, 150.0, 3.0), array(0.001, 4.0, 7e-8)),
)
SMALL["batch_stats"]["last"]["count"] = np.int32(1200)


def test_text_without_moments():
    assert str(report(SMALL)) == (
        "layer  channels  updates      mean      var  |scale|  dead\n"
        "block         3    never      0..0     1..1     0..1     1\n"
        "last          3     1200  -12..150  7e-8..4              0\n"
        "\n"
        "1 of 2 layers was never updated: block. Keep the batch_stats that training returns.\n"
        "\n"
        "1 of 6 channels is dead: the output does not depend on the input."
    )


def test_text_with_moments():
    near = moments_of(array(-12.5, 150.0, 2.9), array(0.001, 4.0, np.inf))
    far = moments_of(array(2.0, 0.5, 1.0), array(1.0, 4.0, 0.25))
    assert repr(report(SMALL, {"last": near, "block": far})) == (
        "layer  channels  updates  drift   mean drift     log2 var  dead  non-finite\n"
        "last          3     1200   0.00  0.00 / 0.00  0.00 / 0.00     0           1\n"
        "block         3    never   1.86  2.00 / 2.00  2.00 / 2.00     1\n"
        "\n"
        "drift: root mean square of y by running less y by batch statistics, in standard deviations of y;\n"
        "mean drift, in standard deviations of the batch, and log2 variance: worst channel / median.\n"
        "\n"
        "layer      mean      var  |scale|\n"
        "last   -12..150  7e-8..4\n"
        "block      0..0     1..1     0..1\n"
        "\n"
        "1 of 2 layers has NaN or inf: last. Go back to statistics that are finite.\n"
        "\n"
        "1 of 2 layers was never updated: block. Keep the batch_stats that training returns.\n"
        "\n"
        "1 of 2 layers differs by more than half a standard deviation between running and batch statistics:\n"
        "evaluation will be worse than training. Run jbn.tools.recalibrate, lower momentum, or check that\n"
        "evaluation data is preprocessed as training data.\n"
        "\n"
        "1 of 6 channels is dead: the output does not depend on the input."
    )


def test_no_sentence_where_nothing_is_wrong():
    assert report(VARIABLES, {"bn": BATCH}).notes == ()


def test_many_layers_are_named_in_part():
    new = {f"bn_{i}": (array(0.0), array(1.0)) for i in range(12)}
    assert report(variables_of(**new)).notes == (
        "12 of 12 layers were never updated: bn_0, bn_1, bn_2, bn_3, and 8 more. "
        "Keep the batch_stats that training returns.",
    )


def test_text_fits_into_100_columns():
    long = "/".join(f"block_{i}" for i in range(20))
    wide = array(-1.234e-5, 5.678e-5), array(1.2e-4, 6.5e-4), array(-1.2e-4, 3.4e-4)
    variables = variables_of(bn=wide)
    for name in variables:
        variables[name][long] = variables[name]["bn"]
    for found in (report(variables), report(variables, {"bn": BATCH, long: BATCH})):
        lines = str(found).splitlines()
        assert max(map(len, lines)) <= 100
        table = "\n\n".join(str(found).split("\n\n")[:3])
        assert "".join(line.split(" ")[0] for line in table.splitlines()).count(long) >= 1


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
    assert png_size(tmp_path / "ranges.png")[0] == 1560


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


def test_matplotlib_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="not installed") as caught:
        plot(VARIABLES)
    assert str(caught.value) == (
        "jbn.tools.plot: matplotlib is not installed. Expected it for a picture. "
        "Install it: pip install 'jbn[examples]', or pip install matplotlib."
    )


FORMS = "Expected a mapping from path to jbn.Moments, or variables or an NNX module with batch_moments. "
TRAIN = (
    "Run the model in training mode: linen with mutable=['batch_stats', 'batch_moments'], NNX after "
    "jbn.nnx.keep_batch_moments(model)."
)
UNREADABLE = (
    "Expected an array of numbers that can be read. "
    "Call it outside of jit, grad and scan, and not on what eval_shape returns."
)
TEXTS = {
    "no variables": (
        lambda: report([VARIABLES]),
        f"jbn.tools.report: variables is {[VARIABLES]!r}. Expected linen variables or an NNX module. "
        "For a linen model pass {'params': params, 'batch_stats': batch_stats}.",
    ),
    "no batch norm": (
        lambda: report({"params": {}}),
        "jbn.tools.report: variables is a model with the collections params. Expected one with a batch norm: "
        "a mean and a var in batch_stats. Pass all variables of the model, {'params': params, 'batch_stats': "
        "batch_stats}.",
    ),
    "epsilon below 0": (
        lambda: report(VARIABLES, epsilon=-1.0),
        "jbn.tools.report: epsilon is -1.0. Expected a static number from 0 up. The usual one is 1e-5.",
    ),
    "traced": (
        lambda: jax.jit(lambda variables: report(variables).rows[0].dead)(VARIABLES),
        f"jbn.tools.report: mean of 'bn' is traced float32[2]. {UNREADABLE}",
    ),
    "abstract": (
        lambda: report(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, VARIABLES))),
        f"jbn.tools.report: mean of 'bn' is float32[2]. {UNREADABLE}",
    ),
    "keys for numbers": (
        lambda: report(variables_of(bn=(*HEALTHY[:2], jax.random.key(0)))),
        f"jbn.tools.report: scale of 'bn' is key<fry>[]. {UNREADABLE}",
    ),
    "shapes": (
        lambda: report(VARIABLES, {"bn": moments_of(array(1.0), array(1.0))}),
        "jbn.tools.report: batch count of 'bn' is of shape (1,). Expected (2,), or the last axes of it, as "
        "for the others. Take moments and variables from the same model.",
    ),
    "unknown path": (
        lambda: report(VARIABLES, {"bn_1": BATCH, ("bn",): BATCH}),
        "jbn.tools.report: moments is one with bn_1. Expected paths of batch norms: bn. Take moments and "
        "variables from the same model.",
    ),
    "variables without moments": (
        lambda: report(VARIABLES, VARIABLES),
        f"jbn.tools.report: moments is a mapping with params, batch_stats. {FORMS}{TRAIN}",
    ),
    "empty moments": (
        lambda: report(VARIABLES, {}),
        f"jbn.tools.report: moments is a mapping with nothing. {FORMS}{TRAIN}",
    ),
    "NNX without moments": (
        lambda: report(NNXNet(), NNXNet()),
        f"jbn.tools.report: moments is a NNXNet without batch_moments. {FORMS}{TRAIN}",
    ),
    "moments of one layer": (
        lambda: report(VARIABLES, BATCH),
        f"jbn.tools.report: moments is a Moments without batch_moments. {FORMS}{TRAIN}",
    ),
    "moments beside a report": (
        lambda: plot(report(VARIABLES), {"bn": BATCH}),
        "jbn.tools.plot: moments is given beside a report. Expected None, for a report has its own. Pass the "
        "variables, or make the report with the moments.",
    ),
}
