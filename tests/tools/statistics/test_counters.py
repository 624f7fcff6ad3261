"""Counters beside the statistics, in the tools that replace, update or average these."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
import jbn.tools
from tests.support.cases import assert_close, assert_trees_close
from tests.support.counters import SETTINGS, TOLERANCE, X, linen, of_nnx

pytestmark = pytest.mark.usefixtures("flax_promotion")


@pytest.mark.parametrize("settings", [SETTINGS, {"momentum": None}], ids=["debias", "cumulative"])
def test_recalibrated_layers_evaluate_by_the_population_and_count_from_there(settings):
    net, variables = linen(settings)
    parts = [X[:6] + 3, X[6:] + 3]

    def train(variables, x, **options):
        return net.apply(variables, x, train=True, **options)

    new = jbn.tools.recalibrate(train, variables, parts)
    dense = variables["params"]["dense"]
    rows = (X + 3) @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    expected = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
    assert_close(net.apply(new, X + 3), expected, 4 * TOLERANCE)
    np.testing.assert_array_equal(new["batch_stats"]["norm"]["rows"], np.full(4, 20, np.float32))
    if settings["momentum"] is None:
        _, after = train(new, X, mutable=["batch_stats"])
        both = np.concatenate([rows, rows - 3 * np.asarray(dense["kernel"]).sum(0)])
        assert_close(after["batch_stats"]["norm"]["mean"], both.mean(0), TOLERANCE)
        assert_close(after["batch_stats"]["norm"]["var"], both.var(0), 4 * TOLERANCE)


def test_one_update_for_micro_batches_as_the_layers_do_it():
    stats = jbn.init(3, count=True)[1]
    parts = {"": jbn.merge(jbn.moments(X[:6]), jbn.moments(X[6:]))}
    for settings in ({"unbiased": True}, {"momentum": None}, {"momentum": 0.5, "skip_nonfinite": True}):
        new = jbn.tools.apply_moments({"batch_stats": stats}, parts, **settings)["batch_stats"]
        _, expected = jbn.batch_norm(None, stats, X, use_running_average=False, **settings)
        assert_trees_close(new, expected, TOLERANCE)
    bad = {"": jbn.moments(np.where(X > 8, np.inf, X))}
    new = jbn.tools.apply_moments({"batch_stats": stats}, bad, skip_nonfinite=True)["batch_stats"]
    assert_trees_close(new, stats, 0.0)


def test_one_update_of_stacked_layers_that_count():
    stats = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), jbn.init(3, count=True)[1])
    moments = jax.tree.map(lambda *parts: jnp.stack(parts), jbn.moments(X), jbn.moments(X + 1))
    new = jbn.tools.apply_moments({"batch_stats": stats}, {"": moments}, momentum=0.0)["batch_stats"]
    assert_close(new["mean"], np.stack([X.mean(0), X.mean(0) + 1]), TOLERANCE)
    np.testing.assert_array_equal(new["count"], [1, 1])


def test_an_average_of_models_takes_the_counters_of_the_new_one():
    average, new = (linen({"momentum": None}, updates=updates)[1] for updates in (1, 3))
    found = jbn.tools.ema(average, new, 0.5)["batch_stats"]["norm"]
    for name in ("count", "rows"):
        np.testing.assert_array_equal(found[name], new["batch_stats"]["norm"][name])
    model = of_nnx({"momentum": None}, updates=3)
    found = jbn.tools.ema(of_nnx({"momentum": None}), model, 0.5)
    np.testing.assert_array_equal(found.norm.rows[...], model.norm.rows[...])
    table = {"rows": jnp.ones(2)}  # of anything else
    assert_close(jbn.tools.ema(table, {"rows": jnp.zeros(2)}, 0.5)["rows"], np.full(2, 0.5), 0.0)


def test_replicas_that_counted_weigh_by_their_rows():
    whole = jbn.init(3, count=True)[1]
    replicas = [jbn.update(whole, jbn.moments(x), momentum=None) for x in (X[:4], X[4:])]
    merged = jbn.tools.merge_replicas(jax.tree.map(lambda *parts: jnp.stack(parts), *replicas))
    assert_trees_close(merged, jbn.update(whole, jbn.moments(X), momentum=None), TOLERANCE)
    fresh = jbn.tools.merge_replicas(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), whole))
    assert_trees_close(fresh, whole, 0.0)


def test_debiased_replicas_and_models_are_averaged():
    """Raw statistics hold shares of the initial 0 and 1, which belong to no replica and no model."""
    start, parts = jbn.init(1, count=True)[1], (np.float32([[0], [2]]), np.float32([[10], [12]]))
    replicas = [jbn.update(start, jbn.moments(x), momentum=0.9) for x in parts]
    stacked = {"batch_stats": jax.tree.map(lambda *leaves: jnp.stack(leaves), *replicas)}
    merged = jbn.tools.merge_replicas(jbn.tools.debias(stacked, momentum=0.9)["batch_stats"])
    assert_close(merged["var"], np.concatenate(parts).var(0), 10 * TOLERANCE)
    twice = jbn.update(replicas[0], jbn.moments(parts[0]), momentum=0.9)
    models = [jbn.tools.debias({"batch_stats": stats}, momentum=0.9) for stats in (replicas[0], twice)]
    average = jbn.tools.ema(*models, 0.5)["batch_stats"]
    _, same = jbn.batch_norm(None, average, parts[0], use_running_average=True, momentum=0.9, debias=True)
    assert_close(same["mean"], np.ones(1), TOLERANCE)


def test_layers_without_rows_are_not_recalibrated():
    net, variables = linen()
    apply = lambda v, x, **options: net.apply(v, x, train=True, mask=np.zeros(20, bool), **options)  # noqa: E731
    with pytest.raises(ValueError, match="no batch norm had rows"):
        jbn.tools.recalibrate(apply, variables, [X])


def test_a_module_called_rows_is_averaged_like_any_other():
    model = {"params": {name: {"kernel": jnp.ones(2)} for name in ("rows", "mean", "var")}}
    found = jbn.tools.ema(model, jax.tree.map(jnp.zeros_like, model), 0.5)
    assert_close(found["params"]["rows"]["kernel"], np.full(2, 0.5), 0.0)


def test_other_libraries_get_what_they_keep():
    _, stats = jbn.init(3, count=True)
    assert set(jbn.tools.to_torch(None, stats)) == {"running_mean", "running_var", "num_batches_tracked"}
