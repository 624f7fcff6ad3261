"""Debiased and counted statistics in the tools: what reads or replaces them knows of the initial 0 and 1."""

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
from tests.cases import assert_close, assert_trees_close, tolerance

pytestmark = pytest.mark.usefixtures("flax_promotion")

TOLERANCE = tolerance(np.float32)
X = (np.random.default_rng(0).standard_normal((20, 3)) * 2 + 5).astype(np.float32)
SETTINGS = {"momentum": 0.75, "debias": True}


class Net(nn.Module):
    settings: dict
    affine: bool = True

    @nn.compact
    def __call__(self, x, train=False, **options):
        x = nn.Dense(4, name="dense", use_bias=self.affine)(x)
        norm = jbn.linen.BatchNorm(use_scale=self.affine, use_bias=self.affine, name="norm", **self.settings)
        return norm(x, use_running_average=not train, **options)


class NnxNet(nnx.Module):
    def __init__(self, settings, affine=True):
        self.dense = nnx.Linear(3, 4, use_bias=affine, rngs=nnx.Rngs(0))
        options = {"use_scale": affine, "use_bias": affine, "rngs": nnx.Rngs(1)}
        self.norm = jbn.nnx.BatchNorm(4, **settings, **options)

    def __call__(self, x, **options):
        return self.norm(self.dense(x), **options)


def linen(settings=SETTINGS, affine=True, updates=1):
    """A net and its variables after some updates."""
    net = Net(settings, affine)
    variables = net.init(jax.random.key(0), X)
    for _ in range(updates):
        _, new = net.apply(variables, X, train=True, mutable=["batch_stats"])
        variables = variables | new
    return net, variables


def of_nnx(settings=SETTINGS, affine=True, updates=1):
    model = NnxNet(settings, affine)
    for _ in range(updates):
        model(X)
    model.eval()
    return model


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_a_debiased_model_evaluates_alike_with_the_option_and_without(updates):
    net, variables = linen(updates=updates)
    new = jbn.tools.debias(variables, momentum=0.75)
    expected = net.apply(variables, X)
    for settings in (SETTINGS, {}, {"momentum": None}):
        assert_close(Net(settings).apply(new, X), expected, TOLERANCE)
    assert_trees_close(jbn.tools.debias(new, momentum=0.75), new, 0.0)
    assert_trees_close(new["params"], variables["params"], 0.0)


def test_a_debiased_nnx_model_evaluates_alike_with_the_option_and_without():
    model = of_nnx()
    new = jbn.tools.debias(model)
    assert_close(new(X), model(X), TOLERANCE)
    new.norm.debias = False
    assert_close(new(X), model(X), TOLERANCE)


def test_each_layer_is_debiased_by_its_momentum():
    layers = {
        momentum: jbn.update(jbn.init(3, count=True)[1], jbn.moments(X), momentum=momentum)
        for momentum in (0.5, 0.9)
    }
    cumulative = jbn.update(jbn.init(3, count=True)[1], jbn.moments(X), momentum=None)
    variables = {"batch_stats": {"a": layers[0.5], "b": {"bn": layers[0.9]}, "c": cumulative}}
    new = jbn.tools.debias(variables, momentum={"a": 0.5, ("b", "bn"): 0.9})["batch_stats"]
    for stats in (new["a"], new["b"]["bn"], new["c"]):
        assert_close(stats["mean"], X.mean(0), TOLERANCE)
        assert_close(stats["var"], X.var(0), 10 * TOLERANCE)  # rounded next to 0.9 when it was stored


def test_each_nnx_layer_knows_its_momentum():
    names = {"a": 0.5, "b": 0.9, "c": None}
    model = nnx.Dict(
        {
            n: jbn.nnx.BatchNorm(3, momentum=m, debias=m is not None, rngs=nnx.Rngs(0))
            for n, m in names.items()
        }
    )
    for name in names:
        model[name](X)
    new = jbn.tools.debias(model)
    for name in names:
        assert_close(new[name].mean[...], X.mean(0), TOLERANCE)


def test_stacked_layers_are_debiased_each_by_its_count():
    stats = [linen(updates=updates)[1]["batch_stats"]["norm"] for updates in (0, 1, 3)]
    stacked = {"batch_stats": jax.tree.map(lambda *parts: jnp.stack(parts), *stats)}
    new = jbn.tools.debias(stacked, momentum=0.75)["batch_stats"]
    for number, one in enumerate(stats):
        alone = jbn.tools.debias({"batch_stats": one}, momentum=0.75)["batch_stats"]
        assert_trees_close(jax.tree.map(lambda leaf, i=number: leaf[i], new), alone, TOLERANCE)


def test_training_goes_on_from_debiased_statistics():
    """As after updates without end: the next one weighs 1 - momentum."""
    net, variables = linen()
    variables = jbn.tools.debias(variables, momentum=0.75)
    _, new = net.apply(variables, X + 1, train=True, mutable=["batch_stats"])
    dense = variables["params"]["dense"]
    shift = np.asarray(dense["kernel"]).sum(0)
    mean = (X @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])).mean(0)
    assert_close(new["batch_stats"]["norm"]["mean"], mean + 0.25 * shift, TOLERANCE)
    assert int(new["batch_stats"]["norm"]["count"]) == 2**30 + 1


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


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_folding_a_model_that_debiases(affine):
    """Without any bias the offset stays in the mean, which must not be divided again."""
    net, variables = linen(affine=affine)
    folded = jbn.tools.fold_variables(variables, [("dense", "norm")], call=net.apply, x=X)
    assert_close(net.apply(folded, X), net.apply(variables, X), TOLERANCE)
    assert not np.allclose(folded["params"]["dense"]["kernel"], variables["params"]["dense"]["kernel"])
    model = of_nnx(affine=affine)
    assert_close(jbn.tools.fold_variables(model, x=X)(X), model(X), TOLERANCE)


def test_folding_debiased_arrays():
    net, variables = linen()
    new = jbn.tools.debias(variables, momentum=0.75)
    kernel, bias = jbn.tools.fold(
        **variables["params"]["dense"],
        params=variables["params"]["norm"],
        batch_stats=new["batch_stats"]["norm"],
    )
    assert_close(X @ kernel + bias, net.apply(variables, X), TOLERANCE)


def test_the_report_of_debiased_statistics_has_no_drift_after_one_update():
    net, variables = linen()
    _, moments = net.apply(variables, X, train=True, mutable=["batch_stats", "batch_moments"])
    assert jbn.tools.report(variables, moments).rows[0].drift > 0.5
    found = jbn.tools.report(jbn.tools.debias(variables, momentum=0.75), moments)
    assert found.rows[0].drift < 1e-5
    assert " many " in str(found)


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
    with pytest.warns(UserWarning, match="never ran"):
        new = jbn.tools.recalibrate(apply, variables, [X])
    assert_trees_close(new, variables, 0.0)


def test_a_module_called_rows_is_averaged_like_any_other():
    model = {"params": {name: {"kernel": jnp.ones(2)} for name in ("rows", "mean", "var")}}
    found = jbn.tools.ema(model, jax.tree.map(jnp.zeros_like, model), 0.5)
    assert_close(found["params"]["rows"]["kernel"], np.full(2, 0.5), 0.0)


def test_other_libraries_get_what_they_keep():
    _, stats = jbn.init(3, count=True)
    assert set(jbn.tools.to_torch(None, stats)) == {"running_mean", "running_var", "num_batches_tracked"}
