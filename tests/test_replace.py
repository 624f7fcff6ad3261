"""Models that we did not write run with our layers: same variables and outputs, synchronised unedited."""

import contextlib
import functools
import importlib
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax_resnet
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax_models.models.conv_mixer import ConvMixer

import jbn.linen
import jbn.nnx
from tests.cases import assert_close, assert_trees_close

pytestmark = pytest.mark.usefixtures("flax_promotion")

X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
IMAGES = np.random.default_rng(0).standard_normal((16, 32, 32, 3)).astype(np.float32)


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
    traces = []

    @jax.jit
    def mean(variables, x):
        traces.append(None)
        _, new = nn.BatchNorm(False).apply(variables, x, mutable=["batch_stats"])
        return new["batch_stats"]["mean"]

    for _ in range(2):
        assert_close(mean(variables, X), 0.01 * X.mean(0), 1e-5)
        with jbn.linen.replace_batch_norm(momentum=0.0):
            assert_close(mean(variables, X), X.mean(0), 1e-5)
            with jbn.linen.replace_batch_norm(momentum=0.5):
                assert_close(mean(variables, X), 0.5 * X.mean(0), 1e-5)
    assert len(traces) == 3


def resnet18():
    model = jax_resnet.ResNet18(n_classes=10, stage_sizes=[1, 1, 1, 1])
    return model.init, model.apply


def conv_mixer():
    model = ConvMixer(features=16, num_mixer_layers=2, filter_size=3, num_classes=10)

    def apply(variables, x, mutable=False):
        return model.apply(variables, x, deterministic=mutable is False, mutable=mutable)

    return functools.partial(model.init, deterministic=True), apply


def hugging_face(family):
    """Flax models up to version 4: not in the test extra, for that version holds back many others."""
    pytest.importorskip("transformers.modeling_flax_utils", exc_type=ImportError)
    transformers = importlib.import_module("transformers")
    module = importlib.import_module(f"transformers.models.{family.lower()}.modeling_flax_{family.lower()}")
    config = getattr(transformers, f"{family}Config")(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic" if family == "ResNet" else "y",
        groups_width=8,
    )
    model = getattr(module, f"Flax{family}Module")(config)

    def apply(variables, x, mutable=False):
        result = model.apply(variables, x, deterministic=mutable is False, mutable=mutable)
        return result.pooler_output if mutable is False else (result[0].pooler_output, result[1])

    return model.init, apply


THIRD_PARTY = {
    "jax-resnet ResNet18": resnet18,
    "jax-models ConvMixer": conv_mixer,
    "transformers ResNet": lambda: hugging_face("ResNet"),
    "transformers RegNet": lambda: hugging_face("RegNet"),
}


@pytest.mark.parametrize("make", THIRD_PARTY.values(), ids=THIRD_PARTY)
def test_a_model_of_somebody_else(make):
    init, apply = make()
    variables = jax.jit(init)(jax.random.key(0), IMAGES)
    train = jax.jit(lambda v, x: apply(v, x, mutable=["batch_stats"]))
    y, new = train(variables, IMAGES)
    evaluated = jax.jit(apply)(variables | new, IMAGES)
    with jbn.linen.replace_batch_norm():
        assert_trees_close(jax.jit(init)(jax.random.key(0), IMAGES), variables, 1e-6)
        our_y, our_new = train(variables, IMAGES)
        assert_close(jax.jit(apply)(variables | new, IMAGES), evaluated, 1e-5)
    assert_close(our_y, y, 1e-5)
    assert_trees_close(our_new, new, 1e-5)
    with jbn.linen.replace_batch_norm(axis_name="data"):
        cut_y, cut_new = jax.jit(over_devices(lambda v, x: apply(v, x, mutable=["batch_stats"])))(
            variables, IMAGES
        )
    assert_close(cut_y, y, 1e-5)
    assert_trees_close(cut_new, new, 1e-5)


def over_devices(step):
    """One argument whole and one cut over 8 devices; the same for what comes back."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"), P()))


def test_an_nnx_model_of_somebody_else():
    """Not in the test extra, for it asks for PyTorch."""
    resnet = pytest.importorskip("jaxnn.models.resnet", exc_type=ImportError)
    model = resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), num_classes=10, rngs=nnx.Rngs(0))
    theirs, ours, cut = (nnx.clone(model) for _ in range(3))
    jbn.nnx.replace_batch_norm(ours)
    step = nnx.jit(lambda model, x: model(x))
    y, our_y = step(theirs, IMAGES), step(ours, IMAGES)
    assert_close(our_y, y, 1e-5)
    new, our_new = (nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)) for model in (theirs, ours))
    assert_trees_close(our_new, new, 1e-5)
    theirs.eval(), ours.eval()
    assert_close(step(ours, IMAGES), step(theirs, IMAGES), 1e-5)

    graph, state = nnx.split(jbn.nnx.replace_batch_norm(cut, axis_name="data"))

    def run(state, x):
        model = nnx.merge(graph, state)
        return model(x), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    cut_y, cut_new = jax.jit(over_devices(run))(state, IMAGES)
    assert_close(cut_y, y, 1e-5)
    assert_trees_close(cut_new, new, 1e-5)


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
