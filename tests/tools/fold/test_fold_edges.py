"""Folding where values are boxed, complex or at the root of a model: structure and dtypes stay."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import meta

import jbn.linen
import jbn.nnx
from jbn.tools import fold, fold_variables
from tests.support.cases import assert_close, assert_trees_close
from tests.support.compiling import optimized
from tests.support.fold_models import EPSILON, arrays, net, norm, random, variables_of

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


def flops(program, x):
    """Of the program that XLA compiles, in which what the function closes over is constant."""
    return optimized(program).lower(x).compile().cost_analysis()["flops"]


def test_a_folded_batch_norm_is_gone_where_the_variables_are_constants():
    """The program has the operations of one without it, which that of the batch norm does not have."""

    class Net(nn.Module):
        with_norm: bool

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), name="conv")(x)
            x = jbn.linen.BatchNorm(True, epsilon=EPSILON, name="norm")(x) if self.with_norm else x
            return nn.relu(x)

    x, full, bare = random(2, 5, 5, 3), Net(True), Net(False)
    variables = variables_of(full, x)
    folded = fold_variables(variables, [("conv", "norm")], epsilon=EPSILON)
    wanted = flops(lambda x: bare.apply({"params": {"conv": folded["params"]["conv"]}}, x), x)
    assert flops(lambda x: full.apply(folded, x), x) == wanted
    assert flops(lambda x: full.apply(variables, x), x) > wanted


def test_a_folded_batch_norm_of_nnx_is_gone_where_the_module_is_constant():
    x, rngs = random(5, 3), nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs), jbn.nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
    )
    model.layers[1].mean[...] += 1
    folded = fold_variables(model, [("layers/0", "layers/1")])
    wanted = flops(folded.layers[0], x)
    assert flops(folded, x) == wanted
    assert flops(model, x) > wanted


def test_a_complex_scale_on_a_real_kernel_by_pairs():
    """Without a call each pair is proved by itself, in a dtype that holds both."""
    kernel, bias = random(3, 4), np.zeros(4, np.complex64)
    batch_norm = {"scale": (1 + random(4) * 1j).astype(np.complex64)}
    stats = {"mean": random(4), "var": np.abs(random(4)) + 1}
    variables = {
        "params": {"a": {"kernel": kernel, "bias": bias}, "b": batch_norm},
        "batch_stats": {"b": stats},
    }
    folded = fold_variables(
        variables, [("a", "b")], epsilon=np.array(EPSILON)
    )  # as an array, as `fold` takes it
    alone = fold(kernel, bias, batch_norm, stats, epsilon=EPSILON)
    assert jnp.iscomplexobj(folded["params"]["a"]["kernel"])
    factor = folded["params"]["b"]["scale"] / np.sqrt(1 + EPSILON)
    assert_close(folded["params"]["a"]["kernel"] * factor, alone[0], 1e-6)
