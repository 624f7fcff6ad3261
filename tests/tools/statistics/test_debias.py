"""Debiasing: statistics without their share of the initial 0 and 1, for evaluation and for the tools."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.nnx
import jbn.tools
from tests.support.cases import assert_close, assert_trees_close
from tests.support.counters import SETTINGS, TOLERANCE, Net, X, linen, of_nnx

pytestmark = pytest.mark.usefixtures("flax_promotion")


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
