"""What the report says of a model's batch norms: ranges, dead channels, and how far evaluation is off."""

import csv
import io
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
import jbn.tools
from tests.cases import assert_close

X = (np.random.default_rng(0).standard_normal((64, 3)) * 2 + 3).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jbn.linen.BatchNorm(use_running_average=False, name="first")(x)
        return jbn.linen.BatchNorm(use_running_average=False, name="second", use_scale=False)(x)


def measured():
    variables = Net().init(jax.random.key(0), X)
    _, moments = Net().apply(variables, X, mutable=["batch_stats", "batch_moments"])
    return variables, moments


def one_layer(mean, var, scale=None, count=None):
    stats = {"mean": np.float32(mean), "var": np.float32(var)}
    stats |= {} if count is None else {"count": np.int32(count)}
    params = {} if scale is None else {"bn": {"scale": np.float32(scale)}}
    return {"params": params, "batch_stats": {"bn": stats}}


def test_ranges_of_a_layer():
    (row,) = jbn.tools.report(one_layer([1, -2, 3], [0.5, 2, 4], [-1, 2, 0.5], count=7)).rows
    assert (row.path, row.channels, row.updates) == ("bn", 3, 7)
    assert (row.mean_min, row.mean_max, row.var_min, row.var_max) == (-2, 3, 0.5, 4)
    assert (row.scale_min, row.scale_max) == (0.5, 2)
    assert row.drift is None


def test_drift_is_that_of_a_simulation():
    """y of the same rows by running and by batch statistics."""
    variables = one_layer([2, 3, 3], [4, 1, 9])
    (row,) = jbn.tools.report(variables, {"bn": jbn.moments(X)}).rows
    stats = variables["batch_stats"]["bn"]
    exact = X.astype(np.float64)
    running = (exact - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    batch = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    assert math.isclose(row.drift, np.sqrt(np.mean((running - batch) ** 2)), rel_tol=1e-4)
    offsets = np.abs(stats["mean"] - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    assert math.isclose(row.mean_drift_max, offsets.max(), rel_tol=1e-4)
    ratios = np.abs(np.log2(stats["var"] / exact.var(0)))
    assert math.isclose(row.var_drift_max, ratios.max(), rel_tol=1e-4)


def test_the_worst_layer_comes_first_and_recalibration_mends_it():
    variables, moments = measured()
    before = jbn.tools.report(variables, moments)
    assert [row.path for row in before.rows] == ["first", "second"]
    assert before.rows[0].drift > 1
    assert "1 of 2 layers differs by more than half a standard deviation" in " ".join(str(before).split())
    after = jbn.tools.report(jbn.tools.apply_moments(variables, moments, momentum=0.0), moments)
    assert max(row.drift for row in after.rows) < 1e-3


def test_nnx_models_are_reported_alike():
    variables = one_layer([1, 2, 3], [1, 2, 3], [1, 2, 3])
    model = nnx.Dict(bn=jbn.nnx.BatchNorm(3, use_bias=False, rngs=nnx.Rngs(0)))
    for name, value in (variables["params"]["bn"] | variables["batch_stats"]["bn"]).items():
        getattr(model["bn"], name)[...] = jnp.asarray(value)
    assert jbn.tools.report(model).rows == jbn.tools.report(variables).rows
    jbn.nnx.keep_batch_moments(model)
    model["bn"](jnp.asarray(X))
    (row,), (expected,) = (
        jbn.tools.report(variables, moments).rows for moments in (model, {("bn",): jbn.moments(X)})
    )
    assert math.isclose(row.drift, expected.drift, rel_tol=1e-6)


def test_dead_and_broken_channels_are_counted():
    (row,) = jbn.tools.report(one_layer([1, 2, 3, 4], [0, 1, np.nan, 1], [1, 0, 1, 1])).rows
    assert (row.dead, row.nonfinite) == (2, 1)
    assert (row.var_min, row.var_max) == (0, 1)


def test_a_layer_that_was_never_updated_is_named():
    report = jbn.tools.report(Net().init(jax.random.key(0), X))
    assert all(row.never_updated for row in report.rows)
    assert "never updated" in str(report)
    assert not jbn.tools.report(one_layer([0, 0], [1, 2])).rows[0].never_updated


def test_the_table_is_csv_too(tmp_path):
    report = jbn.tools.report(*measured())
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["path"] for row in rows] == ["first", "second"]
    assert float(rows[0]["drift"]) == report.rows[0].drift
    report.to_csv(tmp_path / "report.csv")
    assert (tmp_path / "report.csv").read_text() == report.to_csv()


def test_the_table_fits_a_log():
    text = str(jbn.tools.report(*measured()))
    assert max(map(len, text.splitlines())) <= 100


def test_the_picture_names_layers_and_units(tmp_path):
    pytest.importorskip("matplotlib")
    figure = jbn.tools.plot(jbn.tools.report(*measured()), path=tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["first", "second"]
    assert figure.axes[0].get_xlabel() == "standard deviations of the batch"
    assert len(jbn.tools.plot(measured()[0]).axes) >= 2


def test_statistics_of_stacked_layers_are_all_counted():
    (row,) = jbn.tools.report(one_layer(np.zeros((4, 3)), np.ones((4, 3)))).rows
    assert row.channels == 12


def test_moments_that_do_not_fit_are_an_error():
    variables, _ = measured()
    with pytest.raises(ValueError, match="third"):
        jbn.tools.report(variables, {"third": jbn.moments(X)})
    with pytest.raises(ValueError, match=r"jbn\.tools\.report: "):
        jbn.tools.report(variables, {"first": jbn.moments(X[:, :2])})


def test_complex_means_count_by_their_size():
    variables = one_layer([0, 0], [1, 1])
    variables["batch_stats"]["bn"]["mean"] = np.array([3 + 4j, 0], np.complex64)
    (row,) = jbn.tools.report(variables).rows
    assert_close(np.float64([row.mean_min, row.mean_max]), [0.0, 5.0], 1e-6)
