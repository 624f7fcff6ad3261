"""One update per step and the same answer under Flax's transforms of modules."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn.linen
from tests.support import reference
from tests.support.cases import assert_close, assert_trees_close
from tests.support.small_batch import BATCH_STATS, COTANGENT, PARAMS, TOLERANCE, X, layer


class Block(nn.Module):
    """Dense and batch norm, with the signature that `nn.scan` wants."""

    training: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(x.shape[-1])(x)
        return layer(use_running_average=not self.training, axis_name=self.axis_name)(x), None


def test_nn_remat_updates_once():
    """Of 1, 2, 3, 4 at a rate of 0.1 the mean is 0.25; a second update would make it 0.475."""
    x, cotangent = np.array([[1], [2], [3], [4]], np.float32), COTANGENT[:4, :1]
    model = nn.remat(jbn.linen.BatchNorm)(use_running_average=False, momentum=0.9)
    variables = model.init(jax.random.key(0), x)

    @jax.jit
    def step(params):
        y, new = model.apply(variables | {"params": params}, x, mutable=["batch_stats"])
        return jnp.sum(y * cotangent), new["batch_stats"]

    (_, new), d_params = jax.value_and_grad(step, has_aux=True)(variables["params"])
    assert_close(new["mean"], np.array([0.25]), TOLERANCE)
    xhat = (x - 2.5) / np.sqrt(1.25 + 1e-5)
    assert_close(d_params["scale"], np.sum(xhat * cotangent, 0), TOLERANCE)


@pytest.mark.parametrize("training", [True, False])
def test_nn_scan_over_steps_carries_the_statistics(training):
    class Steps(nn.Module):
        @nn.compact
        def __call__(self, xs):
            def body(module, carry, x):
                return carry, module(x)

            norm = layer(use_running_average=not training)
            run = nn.scan(
                body, variable_carry="batch_stats", variable_broadcast="params", split_rngs={"params": False}
            )
            return run(norm, (), xs)[1]

    variables = {"params": {"BatchNorm_0": PARAMS}, "batch_stats": {"BatchNorm_0": BATCH_STATS}}
    _, new = jax.jit(functools.partial(Steps().apply, mutable=["batch_stats"]))(
        variables, np.broadcast_to(X, (10, 8, 3))
    )
    expected = X.mean(0) * (1 - 0.9**10) if training else np.zeros(3)
    assert_close(new["batch_stats"]["BatchNorm_0"]["mean"], expected, TOLERANCE)


def assert_like_each(training, variables, stacked_x, out):
    """Three blocks in one gave `out`: what each block by itself gives for its x."""
    y, new = out
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], variables)
        expected, state = Block(training=training).apply(one, stacked_x[i], mutable=["batch_stats"])
        assert_close(y[i], expected[0], TOLERANCE)
        assert_trees_close(
            jax.tree.map(lambda a, i=i: a[i], new["batch_stats"]), state["batch_stats"], TOLERANCE
        )


@pytest.mark.parametrize("training", [True, False])
def test_nn_scan_over_layers_stacks_the_statistics(training):
    deep = nn.scan(
        Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
    )
    model = deep(training=training)
    variables = model.init(jax.random.key(0), X)
    (y, _), new = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]))(variables, X)
    assert new["batch_stats"]["BatchNorm_0"]["mean"].shape == (3, 3)
    outputs = [X]
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], variables)
        outputs.append(Block(training=training).apply(one, outputs[-1], mutable=["batch_stats"])[0][0])
    assert_close(y, outputs[-1], 8 * TOLERANCE)  # three normalizations, one after another
    assert_like_each(training, variables, outputs, (np.stack(outputs[1:]), new))


def test_nn_map_variables():
    """Parameters that are transformed before they are used, as in weight normalization."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            double = functools.partial(jax.tree.map, lambda leaf: 2 * leaf)
            layer = nn.map_variables(jbn.linen.BatchNorm, "params", double)
            return layer(False, momentum=0.0, name="bn")(x)

    variables = {"params": {"bn": PARAMS}, "batch_stats": {"bn": BATCH_STATS}}
    y, new = Net().apply(variables, X, mutable=["batch_stats"])
    assert_close(y, 2 * reference.normalize(X, -1, None, None, 1e-5), TOLERANCE)
    assert_close(new["batch_stats"]["bn"]["mean"], X.mean(0), TOLERANCE)


def test_nn_vmap_over_models():
    many = nn.vmap(Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})()
    x = np.stack([X, 2 * X, X - 3])
    variables = many.init(jax.random.key(0), x)
    (y, _), new = jax.jit(functools.partial(many.apply, mutable=["batch_stats"]))(variables, x)
    assert new["batch_stats"]["BatchNorm_0"]["mean"].shape == (3, 3)
    assert_like_each(True, variables, x, (y, new))
