"""Population statistics of a stream, and one update for micro-batches: pooled equals concatenated."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
import jbn.nnx
import jbn.tools
from tests.cases import assert_close, assert_trees_close, tolerance

pytestmark = pytest.mark.usefixtures("flax_promotion")

TOLERANCE = tolerance(np.float32)
X = (np.random.default_rng(0).standard_normal((50, 3)) * 2 + 5).astype(np.float32)
PARTS = [X[:8], X[8:30], X[30:]]


class Net(nn.Module):
    """The first batch norm sees x, the second one what the first gives in training."""

    kind: type = jbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train, mask=None, **options):
        x = self.kind(use_running_average=not train, name="first")(x, mask=mask, **options)
        x = nn.relu(nn.Dense(4, name="dense")(x))
        return self.kind(use_running_average=not train, name="second")(x, mask=mask, **options)


def linen(kind=jbn.linen.BatchNorm):
    net = Net(kind)
    return net.init(jax.random.key(0), X, False), lambda v, x, **options: net.apply(v, x, True, **options)


class NnxNet(nnx.Module):
    def __init__(self, kind):
        self.first = kind(3, rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(3, 4, rngs=nnx.Rngs(1))
        self.second = kind(4, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.second(nnx.relu(self.dense(self.first(x))))


@pytest.mark.parametrize("kind", [jbn.linen.BatchNorm, nn.BatchNorm], ids=["jbn", "flax"])
def test_pooled_equals_concatenated(kind):
    variables, train = linen(kind)
    before = jax.tree.map(np.array, variables)
    new = jbn.tools.recalibrate(train, variables, PARTS)["batch_stats"]
    assert_close(new["first"]["mean"], X.mean(0), TOLERANCE)
    assert_close(new["first"]["var"], X.var(0), TOLERANCE)
    hidden = np.concatenate([(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in PARTS])
    hidden = np.maximum(
        hidden @ variables["params"]["dense"]["kernel"] + variables["params"]["dense"]["bias"], 0
    )
    assert_close(new["second"]["mean"], hidden.mean(0), 10 * TOLERANCE)  # through a layer and a product
    assert_close(new["second"]["var"], hidden.var(0), 10 * TOLERANCE)
    assert_trees_close(variables, before, 0.0)


@pytest.mark.parametrize("kind", [jbn.nnx.BatchNorm, nnx.BatchNorm], ids=["jbn", "flax"])
def test_nnx_models(kind):
    model = NnxNet(kind)
    model.eval()
    new = jbn.tools.recalibrate(lambda model, x: model(x), model, PARTS)
    assert_close(new.first.mean[...], X.mean(0), TOLERANCE)
    assert_close(new.first.var[...], X.var(0), TOLERANCE)
    np.testing.assert_array_equal(model.first.mean[...], np.zeros(3, np.float32))
    assert type(new.first) is kind
    assert new.first.use_running_average


def test_nothing_is_printed_where_there_is_no_terminal(capfd):
    variables, train = linen()
    jbn.tools.recalibrate(train, variables, PARTS)
    assert capfd.readouterr() == ("", "")


def test_twice_is_once():
    variables, train = linen()
    once = jbn.tools.recalibrate(train, variables, PARTS)
    assert_trees_close(jbn.tools.recalibrate(train, once, PARTS), once, 0.0)


def test_masked_batches_weigh_by_their_rows():
    net, (variables, _) = Net(), linen()
    padded = [
        (np.concatenate([x, np.full((30 - len(x), 3), np.nan, np.float32)]), np.arange(30) < len(x))
        for x in PARTS
    ]
    train = lambda v, batch, **options: net.apply(v, batch[0], True, batch[1], **options)  # noqa: E731
    new = jbn.tools.recalibrate(train, variables, padded)["batch_stats"]
    assert_close(new["first"]["var"], X.var(0), TOLERANCE)


def test_sharded_batches_are_measured_as_a_whole():
    variables, train = linen()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    batches = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (X[:8], X[8:48])]
    new = jbn.tools.recalibrate(train, variables, batches)["batch_stats"]
    assert_close(new["first"]["mean"], X[:48].mean(0), TOLERANCE)


def test_it_stops_after_so_many_batches_or_at_an_accuracy():
    variables, train = linen()
    seen = []

    def stream():
        rng = np.random.default_rng(1)
        for _ in range(1000):
            seen.append(None)
            yield rng.standard_normal((64, 3)).astype(np.float32)

    jbn.tools.recalibrate(train, variables, stream(), max_batches=3)
    assert len(seen) == 3
    seen.clear()
    jbn.tools.recalibrate(train, variables, stream(), tolerance=0.03)
    # 1 / sqrt(64 * batches) is 0.03 at 17 batches; the worst of seven channels needs some more.
    assert 8 <= len(seen) < 60


def test_a_layer_that_never_ran_is_named_and_kept():
    variables, train = linen()
    variables["batch_stats"]["idle"] = {"mean": jnp.full(2, 7.0), "var": jnp.full(2, 9.0)}
    with pytest.warns(UserWarning, match="idle never ran"):
        new = jbn.tools.recalibrate(train, variables, PARTS)
    assert_trees_close(new["batch_stats"]["idle"], variables["batch_stats"]["idle"], 0.0)


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


TEXTS = {
    "no batches": (
        lambda: jbn.tools.recalibrate(linen()[1], linen()[0], []),
        "jbn.tools.recalibrate: batches is empty. Expected one batch or more. A generator gives its batches "
        "only once.",
    ),
    "no batch norm": (
        lambda: jbn.tools.recalibrate(None, {"params": {}}, [X]),
        "jbn.tools.recalibrate: variables is a model with the collections params. Expected one with a batch "
        "norm: a mean and a var in batch_stats. Pass all variables of the model, {'params': params, "
        "'batch_stats': batch_stats}.",
    ),
    "no moments": (
        lambda: jbn.tools.apply_moments(linen()[0]),
        "jbn.tools.apply_moments: moments is empty. Expected the moments of one layer or more. Name the "
        "collection, apply(..., mutable=['batch_moments']), or call jbn.nnx.keep_batch_moments(model) before "
        "training.",
    ),
    "moments of another model": (
        lambda: jbn.tools.apply_moments(linen()[0], {("third",): jbn.moments(X)}),
        "jbn.tools.apply_moments: moments is those of third. Expected layers of the model (first, second). "
        "Pass the variables of the model that was measured.",
    ),
}
