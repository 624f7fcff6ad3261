"""What recalibration warns of: layers that never ran, and batches that are not finite."""

import re

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
from tests.support.cases import assert_close, assert_trees_close
from tests.support.recalibration import PARTS, TOLERANCE, X, linen

pytestmark = pytest.mark.usefixtures("flax_promotion")


def whole(text):
    return f"^{re.escape(text)}$"


NEVER = (
    "jbn.tools.recalibrate: {} never ran in training mode, so the old statistics stay there. Does "
    "apply_fn run the whole model in training mode, with nothing frozen?"
)


def test_a_layer_that_never_ran_is_named_and_kept():
    variables, train = linen()
    variables["batch_stats"]["idle"] = {"mean": jnp.full(2, 7.0), "var": jnp.full(2, 9.0)}
    with pytest.warns(UserWarning, match=whole(NEVER.format("idle"))):
        new = jbn.tools.recalibrate(train, variables, PARTS)
    assert_trees_close(new["batch_stats"]["idle"], variables["batch_stats"]["idle"], 0.0)
    assert_close(new["batch_stats"]["first"]["mean"], X.mean(0), TOLERANCE)


class Mine(nn.BatchNorm):
    pass


class MineInNnx(nnx.BatchNorm):
    pass


def test_layers_of_classes_that_are_not_measured_are_named():
    """Not as layers that never ran, and with what makes them layers that are measured."""
    says = "jbn.tools.recalibrate: the old statistics stay in {}, whose classes are not measured. {}"
    model = nn.Sequential([jbn.linen.BatchNorm(use_running_average=False), Mine(use_running_average=False)])
    variables = model.init(jax.random.key(0), X)
    way = "Call it inside of a `with jbn.linen.replace_batch_norm(classes=(Mine,)):`."
    with pytest.warns(UserWarning, match=whole(says.format("layers_1", way))):
        new = jbn.tools.recalibrate(model.apply, variables, PARTS)
    assert_close(new["batch_stats"]["layers_0"]["mean"], X.mean(0), TOLERANCE)
    with jbn.linen.replace_batch_norm(classes=(Mine,)):
        new = jbn.tools.recalibrate(model.apply, variables, PARTS)
    assert_close(new["batch_stats"]["layers_1"]["var"], np.ones(X.shape[1]), 1e-3)

    module = nnx.Sequential(*(kind(X.shape[1], rngs=nnx.Rngs(0)) for kind in (jbn.nnx.BatchNorm, MineInNnx)))
    way = "Call jbn.nnx.replace_batch_norm(model, classes=(MineInNnx,)) before."
    with pytest.warns(UserWarning, match=whole(says.format("layers/1", way))):
        jbn.tools.recalibrate(lambda module, x: module(x), module, PARTS)


def test_layers_that_saw_no_row_are_named_and_kept():
    """The second one, of two that share the model."""

    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jbn.linen.BatchNorm(use_running_average=False, name="first")(x)
            return jbn.linen.BatchNorm(use_running_average=False, name="second")(
                x, mask=np.zeros(len(x), bool)
            )

    net = Masked()
    variables = net.init(jax.random.key(0), X)
    with pytest.warns(UserWarning, match=whole(NEVER.format("second"))):
        new = jbn.tools.recalibrate(net.apply, variables, PARTS)
    assert_trees_close(new["batch_stats"]["second"], variables["batch_stats"]["second"], 0.0)


def test_layers_in_evaluation_mode_are_named_and_kept():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jbn.linen.BatchNorm(use_running_average=True, name="first")(x)
            return jbn.linen.BatchNorm(use_running_average=False, name="second")(x)

    net = Half()
    variables = net.init(jax.random.key(0), X)
    with pytest.warns(UserWarning, match=whole(NEVER.format("first"))):
        new = jbn.tools.recalibrate(net.apply, variables, PARTS)
    assert_trees_close(new["batch_stats"]["first"], variables["batch_stats"]["first"], 0.0)
    assert_close(new["batch_stats"]["second"]["var"], X.var(0) / np.float32(1 + 1e-5), TOLERANCE)


def test_batches_that_are_not_finite_are_told():
    variables, train = linen()
    text = (
        "jbn.tools.recalibrate: the moments of the batches hold NaN or inf in first, second. Look for NaN in "
        "the data, and for layers before these that give it."
    )
    with pytest.warns(UserWarning, match=whole(text)):
        jbn.tools.recalibrate(train, variables, [X[:8], X[8:] * np.float32(np.inf)])
