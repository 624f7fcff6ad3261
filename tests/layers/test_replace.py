"""Flax's layers become ours where a model is used: all of them, no others, and only there."""

import contextlib
import threading

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import jbn
import jbn.linen
import jbn.nnx
from tests.support.cases import assert_close, assert_trees_close

pytestmark = pytest.mark.usefixtures("flax_promotion")

X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)


class Subclass(nn.BatchNorm):
    pass


class Net(nn.Module):
    """Every place in which a batch norm can stand: plain, lifted, inside a submodule; and what is none."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.remat(nn.BatchNorm)(use_running_average=not train)(x)
        x = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=not train, momentum=0.5)])(x)
        x = Subclass(use_running_average=not train)(nn.LayerNorm()(x))
        return nn.BatchNorm(name="last", use_bias=False)(x, use_running_average=not train)


def replaced_calls(run):
    """How many layers of ours a call applies."""
    calls = []

    def count(call, args, kwargs, context):
        if isinstance(context.module, jbn.linen.BatchNorm) and context.method_name == "__call__":
            calls.append(context.module.momentum)
        return call(*args, **kwargs)

    with nn.intercept_methods(count):
        run()
    return calls


def test_variables_and_outputs_are_the_same():
    variables = Net().init(jax.random.key(0), X, False)
    y, new = Net().apply(variables, X, True, mutable=["batch_stats"])
    with jbn.linen.replace_batch_norm():
        assert_trees_close(Net().init(jax.random.key(0), X, False), variables, 0.0)
        our_y, our_new = Net().apply(variables, X, True, mutable=["batch_stats"])
        assert_close(Net().apply(variables, X, False), np.asarray(Net().apply(variables, X, False)), 1e-5)
    assert_close(our_y, y, 1e-5)
    assert_trees_close(our_new, new, 1e-5)


def test_other_layers_and_subclasses_are_left_alone():
    variables = Net().init(jax.random.key(0), X, False)
    assert replaced_calls(lambda: Net().apply(variables, X, False)) == []
    with jbn.linen.replace_batch_norm():
        assert replaced_calls(lambda: Net().apply(variables, X, False)) == [0.99, 0.5, 0.99]


def test_contexts_nest_and_end():
    def momenta():
        return replaced_calls(lambda: nn.BatchNorm(True).init(jax.random.key(0), X))

    with jbn.linen.replace_batch_norm(momentum=0.1, epsilon=1.0):
        assert momenta() == [0.1]
        with jbn.linen.replace_batch_norm(momentum=0.2):
            assert momenta() == [0.2]
            y, _ = nn.BatchNorm(True).init_with_output(jax.random.key(0), X)
            assert_close(y, X / np.sqrt(2), 1e-5)
        assert momenta() == [0.1]
    assert momenta() == []


def test_other_threads_are_left_alone():
    found = []
    with jbn.linen.replace_batch_norm():
        thread = threading.Thread(
            target=lambda: found.append(replaced_calls(lambda: nn.BatchNorm(True).init(jax.random.key(0), X)))
        )
        thread.start()
        thread.join()
    assert found == [[]]


def test_an_error_inside_ends_the_context():
    with pytest.raises(RuntimeError, match="inside"), jbn.linen.replace_batch_norm(momentum=0.1):
        raise RuntimeError("inside")
    assert replaced_calls(lambda: nn.BatchNorm(True).init(jax.random.key(0), X)) == []


class ModeInTheCall(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(momentum=0.5)(nn.BatchNorm()(x, not train), use_running_average=not train)


def test_an_override_of_the_mode_counts_for_more_than_the_call():
    variables = ModeInTheCall().init(jax.random.key(0), X, True)
    with jbn.linen.replace_batch_norm(use_running_average=True):
        y = ModeInTheCall().apply(variables, X, True)  # nothing is mutable: it evaluates
    assert_close(y, X / (1 + 1e-5), 1e-5)


def test_intermediates_are_captured_once():
    variables = Net().init(jax.random.key(0), X, False)
    shapes = []
    for context in (contextlib.nullcontext(), jbn.linen.replace_batch_norm()):
        with context:
            _, captured = Net().apply(variables, X, False, capture_intermediates=True)
        shapes.append(jax.tree.map(jnp.shape, captured))
    assert shapes[0] == shapes[1]


def test_a_function_compiled_outside_is_traced_again_inside():
    variables = nn.BatchNorm(False).init(jax.random.key(0), X)

    @jax.jit
    @chex.assert_max_traces(3)  # fewer would give the values of another setting
    def mean(variables, x):
        _, new = nn.BatchNorm(False).apply(variables, x, mutable=["batch_stats"])
        return new["batch_stats"]["mean"]

    for _ in range(2):
        assert_close(mean(variables, X), 0.01 * X.mean(0), 1e-5)
        with jbn.linen.replace_batch_norm(momentum=0.0):
            assert_close(mean(variables, X), X.mean(0), 1e-5)
            with jbn.linen.replace_batch_norm(momentum=0.5):
                assert_close(mean(variables, X), 0.5 * X.mean(0), 1e-5)


class NnxSubclass(nnx.BatchNorm):
    pass


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.same = self.norm
        self.many = nnx.List(
            [nnx.BatchNorm(3, use_running_average=True, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)]
        )
        self.own = NnxSubclass(3, rngs=rngs)

    def __call__(self, x):
        return self.own(self.many[1](self.many[0](self.same(self.norm(x)))))


def test_nnx_layers_are_swapped_wherever_they_are_held():
    theirs, ours = NnxNet(nnx.Rngs(0)), jbn.nnx.replace_batch_norm(NnxNet(nnx.Rngs(0)), axis_name=None)
    assert type(ours.norm) is type(ours.many[0]) is jbn.nnx.BatchNorm
    assert ours.same is ours.norm
    assert type(ours.own) is NnxSubclass
    assert ours.norm.momentum == 0.5
    assert ours.many[0].use_running_average is True
    assert_close(ours(jnp.asarray(X)), theirs(jnp.asarray(X)), 1e-5)
    assert_trees_close(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)), 1e-5)
    ours.eval()
    assert ours.norm.use_running_average is True


def test_an_nnx_layer_alone_and_under_jit_and_split():
    layer = jbn.nnx.replace_batch_norm(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), momentum=0.0)
    nnx.jit(lambda layer, x: layer(x))(layer, X)
    assert_close(layer.mean[...], X.mean(0), 1e-6)
    copy = nnx.merge(*nnx.split(layer))
    assert type(copy) is jbn.nnx.BatchNorm


def test_overrides_reach_layers_that_are_replaced_already():
    layer = jbn.nnx.replace_batch_norm(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), axis_name="data")
    assert jbn.nnx.replace_batch_norm(layer, axis_name=None) is layer
    assert layer.axis_name is None


# Overrides of layers that are ours already, of some layers, and of classes that somebody else wrote.


class TheirBatchNorm(nn.Module):
    """A model's own copy of the class, with Flax's variables."""

    use_running_average: bool = False
    momentum: float = 0.5

    @nn.compact
    def __call__(self, x):
        raise AssertionError("this one is replaced")


class TwoParts(nn.Module):
    kind: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        return self.kind(False, name="head")(Block(self.kind, name="backbone")(x))


class Block(nn.Module):
    kind: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        return self.kind(False, name="norm")(x)


def moved(model, variables):
    """The names of the layers whose statistics a training step moves."""
    _, new = model.apply(variables, X, mutable=["batch_stats"])
    before, after = (flatten_dict(tree["batch_stats"], sep="/") for tree in (variables, new))
    return sorted(
        path.removesuffix("/mean")
        for path, mean in before.items()
        if path.endswith("mean") and not np.array_equal(mean, after[path])
    )


@pytest.mark.parametrize("kind", [nn.BatchNorm, jbn.linen.BatchNorm])
@pytest.mark.parametrize(
    ("where", "left"),
    [
        (None, []),
        ("backbone/*", ["head"]),
        ("*norm", ["head"]),
        (lambda path: path == "head", ["backbone/norm"]),
    ],
)
def test_overrides_by_path(kind, where, left):
    model = TwoParts(kind)
    variables = model.init(jax.random.key(0), X)
    assert moved(model, variables) == ["backbone/norm", "head"]
    with jbn.linen.replace_batch_norm(where, frozen=True):
        assert moved(model, variables) == left


@pytest.mark.parametrize("kind", ["predicate", "array"])
def test_jit_traces_again_for_what_only_looks_the_same(kind):
    """A predicate at the address of one that is gone, and an array that prints alike."""
    model = TwoParts(jbn.linen.BatchNorm)
    variables = model.init(jax.random.key(0), X)
    step = jax.jit(
        lambda: model.apply(variables, X, mutable=["batch_stats"])[1]["batch_stats"]["head"]["mean"]
    )

    def mean(which):
        settings = {"momentum": 0.0}
        if kind == "predicate":
            settings["where"] = lambda path, name=("head", "backbone")[which]: path.startswith(name)
        else:
            settings["momentum"] = jnp.float32((0.9911, 0.9912)[which])
        with np.printoptions(precision=2), jbn.linen.replace_batch_norm(**settings):
            return np.asarray(step())

    first = mean(0)
    found = [mean(which) for which in (1, 0, 1)]
    np.testing.assert_array_equal(found[1], first)
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[0] - first).max() > 0


def test_a_traced_override_is_of_its_trace():
    @jax.jit
    def inner(variables, x):
        _, new = nn.BatchNorm(False).apply(variables, x, mutable=["batch_stats"])
        return new["batch_stats"]["mean"]

    variables = nn.BatchNorm(False).init(jax.random.key(0), X)

    def outer(momentum):
        with jbn.linen.replace_batch_norm(momentum=momentum):
            return inner(variables, X)

    for momentum in (0.5, 0.25):
        found = jax.jit(outer)(jnp.float32(momentum))
        assert_close(found, (1 - momentum) * X.mean(0), 1e-6)


def test_contexts_of_different_parts_nest():
    model = TwoParts(jbn.linen.BatchNorm)
    variables = model.init(jax.random.key(0), X)
    with (
        jbn.linen.replace_batch_norm(where="head", momentum=0.0),
        jbn.linen.replace_batch_norm(where="backbone/*", frozen=True),
    ):
        _, new = model.apply(variables, X, mutable=["batch_stats"])
    assert_close(new["batch_stats"]["head"]["mean"], (X / np.sqrt(1 + 1e-5)).mean(0), 1e-6)
    np.testing.assert_array_equal(new["batch_stats"]["backbone"]["norm"]["mean"], np.zeros(3, np.float32))


def test_classes_that_somebody_else_wrote():
    variables = jbn.linen.BatchNorm(False).init(jax.random.key(0), X)
    with jbn.linen.replace_batch_norm(classes=(TheirBatchNorm,)):
        _, new = TheirBatchNorm().apply(variables, X, mutable=["batch_stats"])
    assert_close(new["batch_stats"]["mean"], 0.5 * X.mean(0), 1e-6)


class SettingsInTheBody(nn.Module):
    """Settings without an annotation are no fields."""

    use_running_average = False
    momentum = 0.5
    axis = 1

    @nn.compact
    def __call__(self, x):
        raise AssertionError("this one is replaced")


class SettingsOfOtherNames(TheirBatchNorm):
    eps: float = 1e-3
    decay = 0.9


class NnxSettings(nnx.Module):
    momentum, axis, frozen, decay = 0.5, 1, True, 0.9

    def __init__(self):
        self.scale = self.bias = None
        self.mean, self.var = nnx.BatchStat(jnp.ones(2)), nnx.BatchStat(jnp.ones(2))
        self.eps = 1e-3


def test_settings_in_the_body_of_a_class():
    variables = {"params": jbn.init(3)[0], "batch_stats": jbn.init(3)[1]}
    with jbn.linen.replace_batch_norm(classes=(SettingsInTheBody,)):
        _, new = SettingsInTheBody().apply(variables, X.reshape(2, 4, 3).mT, mutable=["batch_stats"])
    assert_close(new["batch_stats"]["mean"], 0.5 * X.mean(0), 1e-6)


def test_settings_of_other_names_are_warned_of_once():
    variables = TwoParts(nn.BatchNorm).init(jax.random.key(0), X)
    with (
        pytest.warns(UserWarning, match=r"SettingsOfOtherNames has settings .*: decay, eps\. ") as found,
        jbn.linen.replace_batch_norm(classes=(SettingsOfOtherNames,)),
    ):
        TwoParts(SettingsOfOtherNames).apply(variables, X, mutable=["batch_stats"])
    assert len(found) == 1
    model = nnx.List([NnxSettings(), NnxSettings()])
    with pytest.warns(UserWarning, match=r"NnxSettings has settings .*: decay, eps\. ") as found:
        jbn.nnx.replace_batch_norm(model, classes=(NnxSettings,))
    assert len(found) == 1
    assert (model[0].momentum, model[0].axis, model[0].frozen) == (0.5, 1, True)


def test_what_was_put_into_a_layer_beside_is_no_matter():
    """An intermediate in a model's own copy, and anything in Flax's layer, which computes nothing with it."""
    theirs, flaxs = NnxTheirs(3), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    theirs.seen = nnx.Intermediate(X)
    flaxs.note, flaxs.seen = "mine", nnx.Variable(X)
    model = jbn.nnx.replace_batch_norm(nnx.List([theirs, flaxs]), classes=(NnxTheirs,))
    assert type(model[0]) is type(model[1]) is jbn.nnx.BatchNorm


def test_a_subclass_of_our_layer_keeps_its_counts():
    class Mine(jbn.nnx.BatchNorm):
        pass

    layer = Mine(3, momentum=None, rngs=nnx.Rngs(0))
    layer(X)
    jbn.nnx.replace_batch_norm(layer, classes=(Mine,))
    layer(X + 1)
    assert_close(layer.mean[...], X.mean(0) + 0.5, 1e-5)


def test_a_wrong_call_inside_is_one_of_the_layer():
    with jbn.linen.replace_batch_norm(), pytest.raises(TypeError, match=r"^BatchNorm\.__call__\(\) "):
        nn.BatchNorm(False).init(jax.random.key(0), X, None, None)


def test_a_context_that_replaces_nothing_warns():
    with (
        pytest.warns(UserWarning, match=r"modules of Dense ran.*classes=\(TheirBatchNorm,\)"),
        jbn.linen.replace_batch_norm(),
    ):
        nn.Dense(2).init(jax.random.key(0), X)
    with (
        pytest.warns(UserWarning, match="look at where="),
        jbn.linen.replace_batch_norm(where="nowhere"),
    ):
        nn.BatchNorm(False).init(jax.random.key(0), X)
    with jbn.linen.replace_batch_norm():
        pass  # nothing ran
    with pytest.warns(UserWarning, match="modules of Linear, and none"):
        jbn.nnx.replace_batch_norm(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


class NnxTheirs(nnx.Module):
    """A model's own copy of NNX's class, without some of its settings and without `num_features`."""

    def __init__(self, features):
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(features)), nnx.BatchStat(jnp.ones(features))
        self.momentum = 0.5


def nnx_parts(kind):
    return nnx.Dict(backbone=nnx.Dict(norm=kind(3, rngs=nnx.Rngs(0))), head=kind(3, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("kind", [nnx.BatchNorm, jbn.nnx.BatchNorm])
@pytest.mark.parametrize("where", ["backbone/*", lambda path: path == "backbone/norm"])
def test_overrides_by_path_in_nnx(kind, where):
    model = jbn.nnx.replace_batch_norm(nnx_parts(kind), where, frozen=True)
    model.backbone.norm(X), model.head(X)
    assert type(model.head) is kind
    assert not np.any(model.backbone.norm.mean[...])
    assert np.all(model.head.mean[...])


def test_classes_of_nnx_that_somebody_else_wrote():
    layer = jbn.nnx.replace_batch_norm(NnxTheirs(3), classes=(NnxTheirs,), epsilon=0.1)
    y = layer(X)
    assert layer.num_features == 3
    assert_close(layer.mean[...], 0.5 * X.mean(0), 1e-6)
    assert_close(y, (X - X.mean(0)) / np.sqrt(X.var(0) + 0.1), 1e-5)


def test_classes_of_nnx_without_values():
    abstract = nnx.eval_shape(lambda: NnxTheirs(3))
    assert jbn.nnx.replace_batch_norm(abstract, classes=(NnxTheirs,)).num_features == 3


def test_a_model_stays_as_it_is_where_one_layer_does_not_fit():
    class OtherNames(NnxTheirs):
        def __init__(self):
            super().__init__(3)
            self.gamma, self.scale = self.scale, ()

    model = nnx.List([NnxTheirs(3), OtherNames()])
    with pytest.raises(ValueError, match="which has no variable scale"):
        jbn.nnx.replace_batch_norm(model, classes=(NnxTheirs, OtherNames))
    assert type(model[0]) is NnxTheirs


@pytest.mark.parametrize("kind", [nn.BatchNorm, nnx.BatchNorm])
def test_classes_of_flax_are_called_as_ours(kind):
    """Also with arguments that have no name, whose meaning is not known."""

    class Passes(kind):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    if kind is nn.BatchNorm:
        with jbn.linen.replace_batch_norm(classes=(Passes, kind)):
            Passes(False).init(jax.random.key(0), X)
    else:
        model = jbn.nnx.replace_batch_norm(Passes(3, rngs=nnx.Rngs(0)), classes=(Passes, kind))
        assert type(model) is jbn.nnx.BatchNorm


def test_what_a_layer_of_flax_holds_is_its_own_matter():
    """A plain array as scale: the layer is Flax's, no class of the caller's, and is replaced as it is."""
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    layer.scale = nnx.data(jnp.ones(3))
    assert type(jbn.nnx.replace_batch_norm(layer)) is jbn.nnx.BatchNorm
