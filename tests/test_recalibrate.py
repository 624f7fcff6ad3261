"""Population statistics of a stream, and one update for micro-batches: pooled equals concatenated."""

import re

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
    def __init__(self, kind=jbn.nnx.BatchNorm):
        self.first = kind(3, rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(3, 4, rngs=nnx.Rngs(1))
        self.second = kind(4, rngs=nnx.Rngs(2))

    def __call__(self, x, **options):
        return self.second(nnx.relu(self.dense(self.first(x, **options))), **options)


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


@pytest.mark.parametrize(("progress", "terminal"), [(True, False), (False, True), (True, True)])
def test_a_bar_is_shown_where_there_is_a_terminal(progress, terminal, capfd, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    variables, train = linen()
    jbn.tools.recalibrate(train, variables, PARTS, progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("Recalibrating" in err) == (progress and terminal)
    assert bool(err) == (progress and terminal)


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


ROWS = np.random.default_rng(3).normal([0, 1000, 5], [1, 30, 0], (16, 16, 3))
STREAM = list(ROWS.astype(np.float32))


def batches_taken(**limits):
    """How many batches of `STREAM`, one channel of which is constant, a single layer takes."""
    layer, (params, batch_stats) = jbn.linen.BatchNorm(use_running_average=False), jbn.init(3)
    stream = iter(STREAM)
    variables = {"params": params, "batch_stats": batch_stats}
    jbn.tools.recalibrate(layer.apply, variables, stream, **limits)
    return len(STREAM) - len(list(stream))


def standard_error(number):
    """Of the worst mean after so many batches, in standard deviations of its channel."""
    seen = np.stack(STREAM[:number])[:, :, :2].astype(np.float64)
    errors = seen.mean(1).std(0, ddof=1) / np.sqrt(number)
    return (errors / seen.reshape(-1, 2).std(0)).max()


def test_it_stops_after_so_many_batches():
    assert batches_taken(max_batches=3) == 3
    assert batches_taken(max_batches=3, tolerance=0.0) == 3


def test_it_stops_at_an_accuracy():
    for number in (10, 12):
        limit = 1.0001 * standard_error(number)
        assert all(standard_error(fewer) > limit for fewer in range(8, number))
        assert batches_taken(tolerance=limit) == number
    assert batches_taken(tolerance=1.0) == 8


def test_each_channel_counts_its_own_batches():
    """Channel 0 has rows in the first batch alone: no spread says how good its mean is."""
    layer, seen = jbn.linen.BatchNorm(use_running_average=False), []

    def stream():
        for number in range(20):
            seen.append(None)
            yield np.tile(X[:8], (8, 1)), np.array([[number == 0, True, True]])

    def train(variables, batch, **options):
        return layer.apply(variables, batch[0], mask=batch[1], **options)

    variables = {"params": jbn.init(3)[0], "batch_stats": jbn.init(3)[1]}
    jbn.tools.recalibrate(train, variables, stream(), tolerance=0.1)
    assert len(seen) == 20


@pytest.mark.parametrize(("length", "most", "total"), [(3, None, 3), (3, 2, 2), (2, 9, 2), (None, 2, 2)])
def test_the_bar_ends_where_it_stops(monkeypatch, length, most, total):
    def track(batches, *_, total=None, **__):
        seen.append(total)
        return batches

    seen, (variables, train) = [], linen()
    monkeypatch.setattr("jbn.tools._recalibrate.track", track)
    batches = PARTS[:length] if length else iter(PARTS)
    jbn.tools.recalibrate(train, variables, batches, max_batches=most)
    assert seen == [total]


def whole(text):
    return f"^{re.escape(text)}$"


NEVER = (
    "jbn.tools.recalibrate: {} never ran in training mode, and keep their statistics. Does apply_fn run the "
    "model in training mode, and are they frozen? Those in nn.scan or nn.vmap need 'batch_moments' beside "
    "'batch_stats' in variable_axes."
)


def test_a_layer_that_never_ran_is_named_and_kept():
    variables, train = linen()
    variables["batch_stats"]["idle"] = {"mean": jnp.full(2, 7.0), "var": jnp.full(2, 9.0)}
    with pytest.warns(UserWarning, match=whole(NEVER.format("idle"))):
        new = jbn.tools.recalibrate(train, variables, PARTS)
    assert_trees_close(new["batch_stats"]["idle"], variables["batch_stats"]["idle"], 0.0)
    assert_close(new["batch_stats"]["first"]["mean"], X.mean(0), TOLERANCE)


def test_layers_that_saw_no_row_are_named_and_kept():
    net, (variables, _) = Net(), linen()
    train = lambda v, x, **options: net.apply(v, x, True, np.zeros(len(x), bool), **options)  # noqa: E731
    with pytest.warns(UserWarning, match="first, second never ran"):
        new = jbn.tools.recalibrate(train, variables, PARTS)
    assert_trees_close(new, variables, 0.0)


def test_a_model_of_which_nothing_ran_stays_as_it_is():
    net, (variables, _) = Net(), linen()
    evaluate = lambda v, x, **options: net.apply(v, x, False, **options)  # noqa: E731
    with pytest.warns(UserWarning, match=whole(NEVER.format("first, second"))):
        new = jbn.tools.recalibrate(evaluate, variables, PARTS)
    assert new is not variables
    assert_trees_close(new, variables, 0.0)
    layer, alone = jbn.linen.BatchNorm(True), {"params": jbn.init(3)[0], "batch_stats": jbn.init(3)[1]}
    with pytest.warns(UserWarning, match=whole(NEVER.format("the model itself"))):
        jbn.tools.recalibrate(layer.apply, alone, PARTS)


def test_batches_that_are_not_finite_are_told():
    variables, train = linen()
    text = (
        "jbn.tools.recalibrate: the batches gave NaN or inf in first, second. Look for NaN in the data, and "
        "for layers before these that give it."
    )
    with pytest.warns(UserWarning, match=whole(text)):
        jbn.tools.recalibrate(train, variables, [X[:8], X[8:] * np.float32(np.inf)])


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
            self.layers = make(nnx.Rngs(0).split(2))

        def __call__(self, x):
            axes = nnx.StateAxes({nnx.Param: 0, nnx.BatchStat: 0})
            return nnx.scan(lambda layer, x: 2 * layer(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)(
                self.layers, x
            )

    mean = jbn.tools.recalibrate(call, Stack(), PARTS).layers.mean[...]
    assert_close(mean, np.stack([X.mean(0), np.zeros(3, np.float32)]), TOLERANCE)
