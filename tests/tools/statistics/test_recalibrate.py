"""Population statistics of a stream of batches: pooled equals concatenated."""

import flax.core
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
from tests.support.cases import assert_close, assert_trees_close
from tests.support.recalibration import PARTS, TOLERANCE, Net, NnxNet, X, linen

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
    collections: tuple[str, ...] = ("params", "batch_stats")

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda layer, x, _: (2 * layer(x), None),
            variable_axes=dict.fromkeys(self.collections, 0),
            split_rngs={"params": True},
            length=2,
        )
        return scan(jbn.linen.BatchNorm(use_running_average=False, name="layers"), x, None)[0]


@pytest.mark.parametrize("more", [(), ("batch_moments",)], ids=["statistics", "moments too"])
def test_scanned_layers(more):
    net = Scanned(("params", "batch_stats", *more))
    variables = net.init(jax.random.key(0), X)
    mean = jbn.tools.recalibrate(net.apply, variables, PARTS)["batch_stats"]["layers"]["mean"]
    assert_close(mean, np.stack([X.mean(0), np.zeros(3, np.float32)]), TOLERANCE)


class OverTime(nn.Module):
    """One batch norm for all steps of a sequence, with one set of statistics."""

    kind: type
    carried: tuple[str, ...]
    stacked: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda layer, carry, x: (carry, layer(x)),
            variable_broadcast="params",
            variable_carry=self.carried,
            variable_axes=dict.fromkeys(self.stacked, 0),
            split_rngs={"params": False},
        )
        return scan(self.kind(use_running_average=False, name="norm"), None, x)[1]


@pytest.mark.parametrize("kind", [jbn.linen.BatchNorm, nn.BatchNorm], ids=["jbn", "flax"])
@pytest.mark.parametrize(
    ("carried", "stacked"),
    [(("batch_stats",), ()), (("batch_stats", "batch_moments"), ()), (("batch_stats",), ("batch_moments",))],
    ids=["statistics", "moments too", "moments of each step"],
)
def test_a_layer_whose_statistics_go_over_time(kind, carried, stacked):
    """The moments of all steps, however the model declares the collection that it may not know."""
    sequences = np.split(X[:48].reshape(4, 12, 3), [5], axis=1)
    params, stats = jbn.init(3)
    variables = {"params": {"norm": params}, "batch_stats": {"norm": stats}}
    new = jbn.tools.recalibrate(OverTime(kind, carried, stacked).apply, variables, sequences)
    assert_close(new["batch_stats"]["norm"]["mean"], X[:48].mean(0), TOLERANCE)
    assert_close(new["batch_stats"]["norm"]["var"], X[:48].var(0), TOLERANCE)


class Step(nn.Module):
    kind: type

    @nn.compact
    def __call__(self, carry, x):
        return carry, self.kind(use_running_average=False, name="norm")(x)


@pytest.mark.parametrize("kind", [jbn.linen.BatchNorm, nn.BatchNorm], ids=["jbn", "flax"])
def test_a_scan_over_time_that_is_the_whole_model(kind):
    """Its carry is there before any module runs. The variables are a FrozenDict, and stay one."""
    sequences = np.split(X[:48].reshape(4, 12, 3), [5], axis=1)
    scan = nn.scan(
        Step, variable_broadcast="params", variable_carry="batch_stats", split_rngs={"params": False}
    )
    params, stats = jbn.init(3)
    variables = flax.core.freeze({"params": {"norm": params}, "batch_stats": {"norm": stats}})
    train = lambda variables, x, **options: scan(kind).apply(variables, None, x, **options)  # noqa: E731
    new = jbn.tools.recalibrate(train, variables, sequences)
    assert_close(new["batch_stats"]["norm"]["mean"], X[:48].mean(0), TOLERANCE)
    assert_close(new["batch_stats"]["norm"]["var"], X[:48].var(0), TOLERANCE)
    assert jax.tree.structure(new) == jax.tree.structure(variables)


@pytest.mark.parametrize("model", ["linen", "pure"])
def test_type_errors_of_the_model_come_through(model):
    variables, train = linen()
    if model == "pure":
        variables = {"batch_stats": jbn.init(3)[1]}
        train = lambda v, x, **options: jbn.batch_norm(  # noqa: E731
            None, v["batch_stats"], x, use_running_average=False, return_moments=True
        )

    def broken(variables, x, **options):
        train(variables, x, **options)
        raise TypeError("the model's own")

    with pytest.raises(TypeError, match="the model's own"):
        jbn.tools.recalibrate(broken, variables, PARTS)


def test_wide_rows_of_a_layer_whose_statistics_go_over_time(x64):
    sequence, stats = X[:48].reshape(4, 12, 3).astype(np.float64), jax.tree.map(np.float64, jbn.init(3)[1])
    variables = {"params": {"norm": jbn.init(3)[0]}, "batch_stats": {"norm": stats}}
    net = OverTime(jbn.linen.BatchNorm, ("batch_stats",), ())
    new = jbn.tools.recalibrate(net.apply, variables, [sequence])["batch_stats"]["norm"]
    assert_close(new["var"], np.float64(X[:48]).var(0), 1e-13)


@pytest.mark.parametrize("kind", [jbn.linen.BatchNorm, nn.BatchNorm], ids=["jbn", "flax"])
def test_layers_of_linen_in_a_model_of_nnx(kind):
    bridged = nnx.bridge.ToNNX(kind(use_running_average=False), rngs=nnx.Rngs(0)).lazy_init(X)
    train = lambda model, x: model(x, mutable=["batch_stats"])  # noqa: E731
    new = jbn.tools.recalibrate(train, bridged, PARTS)
    assert_close(new.mean[...], X.mean(0), TOLERANCE)
    assert_close(new.var[...], X.var(0), TOLERANCE)
    assert not hasattr(new, "moments")


def pure(variables, x):
    """Two batch norms, and no layer."""
    found = {}
    for name in ("first", "second"):
        x, _, found[name] = jbn.batch_norm(
            variables["params"][name],
            variables["batch_stats"][name],
            x,
            use_running_average=False,
            return_moments=True,
        )
        x = jax.nn.relu(x)
    return x, {"batch_moments": found}


@pytest.mark.parametrize("apply_fn", [pure, lambda v, x, **options: pure(v, x)], ids=["plain", "options"])
def test_models_of_pure_functions(apply_fn):
    params, stats = jbn.init(3)
    variables = {
        name: {"first": tree, "second": tree}
        for name, tree in zip(("params", "batch_stats"), (params, stats), strict=True)
    }
    new = jbn.tools.recalibrate(apply_fn, variables, PARTS)["batch_stats"]
    hidden = np.maximum(np.concatenate([(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in PARTS]), 0)
    for name, rows in (("first", X), ("second", hidden)):
        assert_close(new[name]["mean"], rows.mean(0), TOLERANCE)
        assert_close(new[name]["var"], rows.var(0), TOLERANCE)


def test_one_pure_function():
    """At the root of its variables, as a model that is one batch norm."""

    def train(variables, x):
        stats = variables["batch_stats"]
        y, _, moments = jbn.batch_norm({}, stats, x, use_running_average=False, return_moments=True)
        return y, {"batch_moments": moments}

    new = jbn.tools.recalibrate(train, {"batch_stats": jbn.init(3)[1]}, PARTS)
    assert_close(new["batch_stats"]["var"], X.var(0), TOLERANCE)


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
