"""The report's drift: its formulas, from moments in every form, and the order that it gives."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.core import freeze

import jbn
import jbn.linen
import jbn.nnx
import jbn.tools
from jbn.tools import report
from jbn.tools._report.channels import LayerReport
from tests.support.cases import assert_close
from tests.support.report_models import HEALTHY, VARIABLES, NNXNet, array, moments_of, only, variables_of


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jbn.linen.BatchNorm(False, name="last")(jbn.linen.BatchNorm(False, name="first")(x) * x)


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


def test_recalibrated_statistics_take_the_place_of_a_batch():
    """Those of the stream as if they were its moments, of linen and of NNX models alike."""
    mean, var = array(1.0, 1.0), array(4.0, 1.0)
    variables, new = variables_of(bn=HEALTHY), variables_of(bn=(mean, var))
    wanted = report(variables, {"bn": moments_of(mean, var)}).rows
    for other in (new, freeze(new), {"batch_stats": new["batch_stats"]}):
        assert report(variables, other).rows == wanted
    model = NNXNet()
    population = jbn.tools.recalibrate(lambda model, x: model(x), model, [X[:8], X[8:]])
    row = report(model, population).rows[-1]
    pooled = {name: jbn.Moments(array(1.0, 1.0, 1.0), *stats) for name, stats in population_of(population)}
    assert row == report(model, pooled).rows[-1]
    assert row.drift > 0.2
    assert report(population, population).rows[0].drift == 0.0


def population_of(model):
    return [
        (name, (getattr(model, name).mean[...], getattr(model, name).var[...])) for name in ("first", "last")
    ]


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


def test_channels_without_rows_have_no_drift():
    model = NNXNet()
    jbn.nnx.keep_batch_moments(model)
    assert {row.drift for row in report(model).rows} == {None}
    some = moments_of(array(0.5, 7.0), array(2.0, 0.0), count=array(8.0, 0.0))
    found = report(VARIABLES, {"bn": some})
    assert only(found).drift == 0.0
    assert np.isnan(found.channels[0].mean_drift[1])
    assert only(found).dead == 0


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


def test_a_report_cannot_be_written_to():
    found = report(VARIABLES)
    for value, name in ((found, "rows"), (found.rows[0], "dead"), (found.channels[0], "dead")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
