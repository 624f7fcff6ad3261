"""Folding where values are boxed, complex or at the root of a model: structure and dtypes stay."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from jbn.tools import fold, fold_variables
from tests.cases import assert_close, assert_trees_close
from tests.folding import EPSILON, arrays, net, norm, random

pytestmark = pytest.mark.usefixtures("flax_promotion")


def boxed(tree):
    return jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), tree)


def test_boxed_arrays_are_folded_as_their_values():
    kernel, bias, params, stats = arrays()
    assert_trees_close(fold(*boxed((kernel, bias, params, stats))), fold(kernel, bias, params, stats), 0.0)
    assert_trees_close(fold(boxed(kernel), None, None, boxed(stats)), fold(kernel, None, None, stats), 0.0)


def test_boxes_stay_on_a_model():
    model, variables, x = net()
    folded = fold_variables(boxed(variables), call=lambda v, x: model.apply(meta.unbox(v), x), x=x)
    assert jax.tree.structure(folded) == jax.tree.structure(boxed(variables))


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_real_bias_stays_real_in_a_complex_model(use_bias):
    """The offset is complex, and goes where it fits: into the mean."""

    def run(x):
        y = nn.Dense(3, use_bias=use_bias)(x)
        return nn.BatchNorm(True, epsilon=EPSILON)(y)

    x = (random(4, 3) + 1j * random(4, 3)[::-1]).astype(np.complex64)
    model, variables, _ = net(run, x)
    mean = variables["batch_stats"]["BatchNorm_0"]["mean"]
    variables["batch_stats"]["BatchNorm_0"]["mean"] = mean + 1j * mean[::-1]
    folded = fold_variables(variables, call=model.apply, x=x)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, folded)
    assert_close(model.apply(folded, x), model.apply(variables, x), 1e-5)


def test_a_batch_norm_that_is_the_model(capsys):
    model, x = norm(), random(4, 3)
    variables = {
        "params": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
        "batch_stats": {"mean": jnp.ones(3), "var": jnp.ones(3)},
    }
    fold_variables(variables, call=model.apply, x=x)
    assert capsys.readouterr().out == "no layer found for: the model itself\n"
