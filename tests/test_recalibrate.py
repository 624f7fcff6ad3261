"""Population statistics of a stream of batches: pooled equals concatenated."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
import jbn.nnx
import jbn.tools
from tests.cases import assert_close, assert_trees_close
from tests.recalibrating import PARTS, TOLERANCE, Net, NnxNet, X, linen

pytestmark = pytest.mark.usefixtures("flax_promotion")


def assert_pooled(new, kernel, bias):
    """The statistics of `PARTS` as one batch; each part is normalized by itself before the second layer."""
    hidden = np.concatenate([(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in PARTS])
    hidden = np.maximum(hidden @ np.asarray(kernel) + np.asarray(bias), 0)
    for name, rows, accuracy in (("first", X, TOLERANCE), ("second", hidden, 10 * TOLERANCE)):
        assert_close(new[name]["mean"], rows.mean(0), accuracy)
        assert_close(new[name]["var"], rows.var(0), accuracy)


@pytest.mark.parametrize("kind", [jbn.linen.BatchNorm, nn.BatchNorm], ids=["jbn", "flax"])
def test_pooled_equals_concatenated(kind):
    variables, train = linen(kind)
    before = jax.tree.map(np.array, variables)
    new = jbn.tools.recalibrate(train, variables, PARTS)
    assert_pooled(new["batch_stats"], **variables["params"]["dense"])
    assert_trees_close(new["params"], before["params"], 0.0)
    assert_trees_close(variables, before, 0.0)


def call(model, x):
    return model(x)


@pytest.mark.parametrize("kind", [jbn.nnx.BatchNorm, nnx.BatchNorm], ids=["jbn", "flax"])
def test_nnx_models(kind):
    model = NnxNet(kind)
    model.eval()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    new = jbn.tools.recalibrate(call, model, PARTS)
    after = nnx.to_pure_dict(nnx.state(new))
    assert_pooled(after, **after["dense"])
    assert_trees_close(nnx.to_pure_dict(nnx.state(model)), before, 0.0)
    for one in (model, new):
        assert type(one.first) is kind
        assert one.first.use_running_average


def test_pooled_over_many_batches():
    """More than are kept apart before they are merged, and of unequal sizes."""
    x = np.random.default_rng(2).normal([0, 1, 2], size=(100, 3)).astype(np.float32)
    batches = np.split(x, np.cumsum([2, 3] * 20)[:-1])
    layer, (params, batch_stats) = jbn.linen.BatchNorm(use_running_average=False), jbn.init(3)
    variables = {"params": params, "batch_stats": batch_stats}
    new = jbn.tools.recalibrate(layer.apply, variables, batches)["batch_stats"]
    assert_close(new["mean"], x.mean(0), TOLERANCE)
    assert_close(new["var"], x.var(0), TOLERANCE)


def test_twice_is_once():
    variables, train = linen()
    variables["batch_stats"]["first"]["count"] = jnp.int32(7)
    once = jbn.tools.recalibrate(train, variables, PARTS)
    assert_trees_close(jbn.tools.recalibrate(train, once, PARTS), once, 0.0)
    assert int(once["batch_stats"]["first"]["count"]) == 2**30  # nothing is left to debias


@pytest.mark.parametrize("old", [np.nan, np.inf])
def test_old_statistics_play_no_part(old):
    """A diverged model is mended, not with 0 * NaN."""
    variables, train = linen()
    diverged = variables | {"batch_stats": jax.tree.map(lambda v: v + old, variables["batch_stats"])}
    wanted = jbn.tools.recalibrate(train, variables, PARTS)
    assert_trees_close(jbn.tools.recalibrate(train, diverged, PARTS), wanted, 0.0)
    model = NnxNet(jbn.nnx.BatchNorm)
    model.first.var[...] += old
    assert_close(jbn.tools.recalibrate(call, model, PARTS).first.var[...], X.var(0), TOLERANCE)


@pytest.mark.parametrize("kind", [nn.BatchNorm, jbn.linen.BatchNorm], ids=["flax", "jbn"])
def test_complex_rows_where_the_stored_mean_is_real(kind):
    layer, x = kind(use_running_average=False), X.astype(np.complex64) * np.complex64(1 + 2j)
    variables = {"params": jbn.init(3)[0], "batch_stats": jbn.init(3)[1]}
    new = jbn.tools.recalibrate(layer.apply, variables, [x[:20], x[20:]])["batch_stats"]
    assert_close(new["mean"], x.mean(0), TOLERANCE)
    assert_close(new["var"], x.var(0), TOLERANCE)


def test_every_batch_has_a_dropout_mask_of_its_own():
    class Dropped(nnx.Module):
        def __init__(self):
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=0))
            self.norm = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(self.dropout(x))

    model, x = Dropped(), np.ones((8, 3), np.float32)
    one, four = (jbn.tools.recalibrate(call, model, [x] * n).norm.mean[...] for n in (1, 4))
    assert np.abs(one - four).max() > 0.1
    assert int(model.dropout.rngs.count[...]) == 0


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
    assert_close(new["first"]["var"], X[:48].var(0), TOLERANCE)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = dict.fromkeys(("params", "batch_stats", "batch_moments"), 0)
        scan = nn.scan(
            lambda layer, x, _: (2 * layer(x), None),
            variable_axes=axes,
            split_rngs={"params": True},
            length=2,
        )
        return scan(jbn.linen.BatchNorm(use_running_average=False, name="layers"), x, None)[0]


def test_scanned_layers():
    net = Scanned()
    variables = net.init(jax.random.key(0), X)
    mean = jbn.tools.recalibrate(net.apply, variables, PARTS)["batch_stats"]["layers"]["mean"]
    assert_close(mean, np.stack([X.mean(0), np.zeros(3, np.float32)]), TOLERANCE)


def test_scanned_layers_of_nnx():
    """The axes of `nnx.BatchStat` are those of the moments too."""

    class Stack(nnx.Module):
        def __init__(self):
            make = nnx.vmap(lambda rngs: jbn.nnx.BatchNorm(3, rngs=rngs), in_axes=0, out_axes=0)
            self.layers = nnx.split_rngs(splits=2)(make)(nnx.Rngs(0))

        def __call__(self, x):
            axes = nnx.StateAxes({nnx.Param: 0, nnx.BatchStat: 0})
            return nnx.scan(lambda layer, x: 2 * layer(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)(
                self.layers, x
            )

    mean = jbn.tools.recalibrate(call, Stack(), PARTS).layers.mean[...]
    assert_close(mean, np.stack([X.mean(0), np.zeros(3, np.float32)]), TOLERANCE)
