"""Folding arrays: the layer with the batch norm in it computes what both computed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from jbn.tools import fold
from tests.support.cases import assert_close, assert_trees_close
from tests.support.fold_models import (
    EPSILON,
    LAYERS,
    PARTS,
    TOLERANCE,
    arrays,
    filled,
    norm,
    random,
    variables_of,
)

pytestmark = pytest.mark.usefixtures("flax_promotion")


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("make", "shape", "axis"), LAYERS.values(), ids=LAYERS)
def test_the_folded_layer_computes_what_layer_and_batch_norm_compute(make, shape, axis, use_bias, parts):
    x, layer = random(*shape), make(use_bias=use_bias)
    variables = variables_of(layer, x)
    y = layer.apply(variables, x)
    bn = norm(parts, axis=(-2, -1) if isinstance(axis, tuple) else -1)
    bn_variables = variables_of(bn, y, seed=1)
    layer_params = variables["params"]
    kernel, bias = fold(
        layer_params["kernel"],
        layer_params.get("bias"),
        bn_variables.get("params"),
        bn_variables["batch_stats"],
        epsilon=EPSILON,
        axis=axis,
    )
    assert kernel.dtype == bias.dtype == np.float32
    folded = make(use_bias=True).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    assert_close(folded, bn.apply(bn_variables, y), TOLERANCE)


def test_the_value_worked_out_by_hand():
    ones = np.ones(1, np.float32)
    params, batch_stats = {"scale": ones / 2, "bias": -ones}, {"mean": 3 * ones, "var": 4 * ones}
    kernel, bias = fold(2 * ones[None], ones, params, batch_stats, epsilon=1e-3)
    assert abs(float(kernel[0, 0]) - 0.499938) < 5e-7
    assert abs(float(bias[0]) + 1.499938) < 5e-7


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_low_precision_is_rounded_once(dtype):
    kernel, bias, params, stats = arrays(dtype)
    exact = {name: np.asarray(value, np.float64) for name, value in (params | stats).items()}
    factor = exact["scale"] / np.sqrt(exact["var"] + 1e-5)
    expected = {
        "kernel": np.asarray(kernel, np.float64) * factor,
        "bias": (np.asarray(bias, np.float64) - exact["mean"]) * factor + exact["bias"],
        "no bias": -exact["mean"] * factor + exact["bias"],
    }
    folded = dict(zip(("kernel", "bias"), fold(kernel, bias, params, stats), strict=True))
    folded["no bias"] = fold(kernel, None, params, stats)[1]
    for name, value in folded.items():
        assert value.dtype == dtype
        off = np.abs(np.asarray(value, np.float64) - expected[name])
        assert (off <= 0.501 * float(jnp.finfo(dtype).eps) * np.abs(expected[name]) + 1e-6).all(), name


def test_bias_keeps_its_own_dtype():
    kernel, bias, params, stats = arrays(jnp.bfloat16)
    new_kernel, new_bias = fold(kernel, bias.astype(jnp.float32), params, stats)
    assert (new_kernel.dtype, new_bias.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(new_bias, fold(kernel.astype(jnp.float32), bias, params, stats)[1].astype(np.float32), 1e-2)


@pytest.mark.parametrize("dtype", [np.complex64, np.float32])
def test_complex_numbers(dtype):
    kernel, bias, params, stats = arrays(dtype, np.complex64)
    x = (random(5, 3) + 1j * random(5, 3)[::-1]).astype(np.complex64)
    y = x @ np.asarray(kernel) + np.asarray(bias)
    expected, _ = jbn.batch_norm(params, stats, y, use_running_average=True)
    kernel, bias = fold(kernel, bias, params, stats)
    assert kernel.dtype == dtype
    assert bias.dtype == np.complex64
    assert_close(x @ np.asarray(kernel) + np.asarray(bias), expected, 1e-6)


def test_a_constant_channel_without_epsilon_turns_into_bias():
    kernel, bias, params, stats = arrays()
    stats["var"] = stats["var"].at[1].set(0.0)
    kernel, bias = fold(kernel, bias, params, stats, epsilon=0.0)
    np.testing.assert_array_equal(kernel[:, 1], 0.0)
    assert bias[1] == params["bias"][1]
    chex.assert_tree_all_finite((kernel, bias))


def test_the_order_of_the_axes_does_not_matter():
    kernel, (_, stats) = random(3, 2, 4), jbn.init((2, 4))
    stats = filled(stats)
    for one, other in zip(
        fold(kernel, None, None, stats, axis=(-2, -1)),
        fold(kernel, None, {}, stats, axis=(2, 1)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_gradients_are_those_of_layer_and_batch_norm(x64):
    args = jax.tree.map(lambda value: np.asarray(value, np.float64), arrays())
    x, cotangent = random(5, 3).astype(np.float64), random(5, 4).astype(np.float64)

    def together(kernel, bias, params, stats):
        kernel, bias = fold(kernel, bias, params, stats, epsilon=EPSILON)
        return jnp.sum(cotangent * (x @ kernel + bias))

    def apart(kernel, bias, params, stats):
        y, _ = jbn.batch_norm(params, stats, x @ kernel + bias, use_running_average=True, epsilon=EPSILON)
        return jnp.sum(cotangent * y)

    everything = (0, 1, 2, 3)
    grads = jax.jit(jax.grad(together, everything))(*args)
    assert_trees_close(grads, jax.jit(jax.grad(apart, everything))(*args), 1e-12)


@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None)], ids=["over outputs", "over inputs"])
def test_a_sharded_kernel_stays_sharded(spec):
    """Also where the statistics are cut along the same mesh axis."""
    kernel, bias, params, stats = arrays()
    kernel = jnp.concatenate([kernel, kernel[:1]])
    expected = fold(kernel, bias, params, stats)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        cut = jax.device_put(kernel, NamedSharding(mesh, spec))
        rest = jax.device_put((bias, params, stats), NamedSharding(mesh, P("model")))
        new_kernel, new_bias = fold(cut, *rest)
        assert jax.typeof(new_kernel).sharding.spec == spec
        assert_close(new_kernel, expected[0], 1e-6)
        assert_close(new_bias, expected[1], 1e-6)
