"""Models that we did not write run with our layers: same variables and outputs, synchronised unedited."""

import functools
import importlib

import jax
import jax_resnet
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax_models.models.conv_mixer import ConvMixer

import jbn.linen
import jbn.nnx
from tests.support.cases import assert_close, assert_trees_close

pytestmark = pytest.mark.usefixtures("flax_promotion")

IMAGES = np.random.default_rng(0).standard_normal((16, 32, 32, 3)).astype(np.float32)


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
