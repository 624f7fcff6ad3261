"""One update of the statistics for many micro-batches, that of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze

import jbn
import jbn.linen
import jbn.nnx
import jbn.tools
from tests.support.cases import assert_close, assert_trees_close, tolerance
from tests.support.recalibration import Net, NnxNet, X, linen

pytestmark = pytest.mark.usefixtures("flax_promotion")

TOLERANCE = tolerance(np.float32)


@pytest.mark.parametrize("form", ["variables", "paths"])
def test_moments_that_a_checkpoint_made_dicts_of(form):
    """As Orbax restores them without a target."""
    variables, train = linen()
    _, found = train(variables, X, mutable=["batch_moments"], update_batch_stats=False)
    taken_apart = jax.tree.map(lambda m: dict(vars(m)), found, is_leaf=lambda m: isinstance(m, jbn.Moments))
    layers = taken_apart["batch_moments"]
    given = taken_apart if form == "variables" else {name: layers[name]["moments"] for name in layers}
    assert_trees_close(
        jbn.tools.apply_moments(variables, given), jbn.tools.apply_moments(variables, found), 0.0
    )
    assert jbn.tools.report(variables, given).rows == jbn.tools.report(variables, found).rows


def test_accumulated_gradients_with_one_update_of_the_statistics():
    """64 rows of N(5, 2) in 4 micro-batches: the statistics are those of one batch, and Optax steps once."""
    x = (np.random.default_rng(3).standard_normal((64, 3)) * 2 + 5).astype(np.float32)
    net, (variables, _) = Net(), linen()
    optimizer = optax.sgd(0.1)

    @jax.jit
    def accumulate(variables, micro_batches):
        def loss(params, x, moments):
            y, new = net.apply(
                variables | {"params": params} | moments,
                x,
                True,
                update_batch_stats=False,
                mutable=["batch_moments"],
            )
            return jnp.mean(y**3), new

        total, moments = jax.tree.map(jnp.zeros_like, variables["params"]), {}
        for x in micro_batches:
            grads, moments = jax.grad(loss, has_aux=True)(variables["params"], x, moments)
            total = jax.tree.map(lambda t, g: t + g / len(micro_batches), total, grads)
        updates, _ = optimizer.update(total, optimizer.init(variables["params"]))
        variables = variables | {"params": optax.apply_updates(variables["params"], updates)}
        return jbn.tools.apply_moments(variables, moments, momentum=0.9)

    new = accumulate(variables, list(x.reshape(4, 16, 3)))["batch_stats"]["first"]
    assert_close(new["mean"], 0.1 * x.mean(0), TOLERANCE)
    assert_close(new["var"], 0.9 + 0.1 * x.var(0), TOLERANCE)


CYCLES = [X, 3 * X - 1]


def expected_after_cycles(momentum=0.9):
    """Of the layer that sees x: one update for each cycle."""
    stats = jbn.init(3)[1]
    for x in CYCLES:
        stats = jbn.update(stats, jbn.moments(x), momentum=momentum)
    return stats


def test_each_cycle_begins_anew():
    net, (variables, _) = Net(), linen()
    for x in CYCLES:
        for part in (x[:20], x[20:]):
            _, new = net.apply(variables, part, True, update_batch_stats=False, mutable=["batch_moments"])
            variables = variables | new
        variables = jbn.tools.apply_moments(variables, momentum=0.9)
        assert "batch_moments" not in variables
    assert_trees_close(variables["batch_stats"]["first"], expected_after_cycles(), TOLERANCE)


@pytest.mark.parametrize("given", [False, True])
def test_each_cycle_of_an_nnx_model_begins_anew(given):
    model = NnxNet(jbn.nnx.BatchNorm)
    jbn.nnx.keep_batch_moments(model)
    old = model.first.mean[...]
    for x in CYCLES:
        for part in (x[:20], x[20:]):
            model.first(part, update_batch_stats=False)
        model = jbn.tools.apply_moments(model, model if given else None, momentum=0.9)
        assert not model.first.batch_moments.get_value().count.any()
    wanted = expected_after_cycles()
    assert_close(model.first.mean[...], wanted["mean"], TOLERANCE)
    assert_close(model.first.var[...], wanted["var"], TOLERANCE)
    np.testing.assert_array_equal(old, np.zeros(3, np.float32))


def test_moments_by_path():
    """In the forms that `report` takes."""
    variables, batch = {"batch_stats": {"block": {"bn": jbn.init(3)[1]}}}, jbn.moments(X)
    wanted = jbn.update(jbn.init(3)[1], batch)
    for moments in ({"block/bn": batch}, {("block", "bn"): batch}, freeze({"block/bn": batch})):
        new = jbn.tools.apply_moments(variables, moments)
        assert_trees_close(new["batch_stats"]["block"]["bn"], wanted, TOLERANCE)


def test_complex_moments_where_the_stored_mean_is_real():
    x = X.astype(np.complex64) * np.complex64(1 + 2j)
    new = jbn.tools.apply_moments({"batch_stats": jbn.init(3)[1]}, {"": jbn.moments(x)}, momentum=0.5)
    assert_close(new["batch_stats"]["mean"], 0.5 * x.mean(0), TOLERANCE)


def test_moments_are_taken_in_every_form():
    net, (variables, _) = Net(), linen()
    _, moments = net.apply(variables, X, True, update_batch_stats=False, mutable=["batch_moments"])
    by_path = {(name,): layer["moments"] for name, layer in moments["batch_moments"].items()}
    expected = {path[0]: jbn.update(variables["batch_stats"][path[0]], m) for path, m in by_path.items()}
    for new in (
        jbn.tools.apply_moments(variables | moments),
        jbn.tools.apply_moments(variables, moments),
        jbn.tools.apply_moments(variables, by_path),
    ):
        assert_trees_close(new["batch_stats"], expected, 0.0)
        assert new["params"] is variables["params"]
    some = jbn.tools.apply_moments(variables, {("first",): by_path["first",]})["batch_stats"]
    assert_trees_close(some["first"], expected["first"], 0.0)
    assert_trees_close(some["second"], variables["batch_stats"]["second"], 0.0)
