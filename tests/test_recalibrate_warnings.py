"""What recalibration warns of: layers that never ran, and batches that are not finite."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import jbn
import jbn.linen
import jbn.tools
from tests.cases import assert_close, assert_trees_close
from tests.recalibrating import PARTS, TOLERANCE, Net, X, linen

pytestmark = pytest.mark.usefixtures("flax_promotion")


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
