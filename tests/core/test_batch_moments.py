"""The moments of a batch beside y: from the function, and from the layers, in training and in evaluation."""

import functools

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
from tests.support.cases import CASES, assert_trees_close, by_name, tolerance
from tests.support.small_batch import BATCH_STATS, MASK, PARAMS, X

TOLERANCE = tolerance(np.float32)


@pytest.mark.parametrize("evaluating", [False, True], ids=["train", "evaluate"])
@pytest.mark.parametrize(**by_name(CASES))
def test_they_are_those_that_the_batch_is_normalized_by(case, evaluating):
    x, settings = case.make_x(), case.settings | {"use_running_average": evaluating}

    @jax.jit
    def run(x):
        arguments = (case.make_params(), case.make_batch_stats(), x)
        with_moments = jbn.batch_norm(*arguments, return_moments=True, **settings)
        moments = jbn.moments(x, axis=case.axis, mask=case.make_mask())
        return with_moments, jbn.batch_norm(*arguments, **settings), moments

    (y, new, found), without, expected = run(x)
    assert_trees_close(found, expected, TOLERANCE)
    assert_trees_close((np.where(np.isfinite(y), y, 0), new), without, tolerance(case.dtype))


@pytest.mark.parametrize("evaluating", [False, True, "traced"])
@pytest.mark.parametrize("settings", [{}, {"mask": MASK}, {"virtual_batch_size": 4}], ids=str)
def test_they_have_gradients(settings, evaluating):
    weights = np.array([0.5, -1, 2], np.float32)

    def loss(moments):
        return jnp.sum(weights * (jnp.sin(moments.mean) + moments.var**2))

    @jax.jit
    def gradients(x, flag):
        def ours(x):
            flag_ = flag if evaluating == "traced" else evaluating
            result = jbn.batch_norm(
                PARAMS, BATCH_STATS, x, use_running_average=flag_, return_moments=True, **settings
            )
            return loss(result[2])

        return jax.grad(ours)(x), jax.grad(lambda x: loss(jbn.moments(x, mask=settings.get("mask"))))(x)

    found, expected = gradients(X, True)
    assert np.abs(np.asarray(expected)).max() > 0.1
    assert_trees_close(found, expected, TOLERANCE)


@pytest.mark.parametrize("evaluating", [False, True])
def test_they_are_over_devices(evaluating):
    run = functools.partial(
        jbn.batch_norm, use_running_average=evaluating, return_moments=True, axis_name="data"
    )
    _, _, found = jax.vmap(run, (None, None, 0), (0, None, None), axis_name="data")(
        PARAMS, BATCH_STATS, X.reshape(4, 2, 3)
    )
    assert_trees_close(found, jbn.moments(X), TOLERANCE)


def test_without_running_statistics():
    _, none, found = jbn.batch_norm(None, None, X, use_running_average=True, return_moments=True)
    assert none is None
    assert_trees_close(found, jbn.moments(X), TOLERANCE)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, **options):
        for _ in range(2):
            x = nn.Dense(3, use_bias=False)(x)
            evaluating = not train if isinstance(train, bool) else ~train
            x = jnp.tanh(jbn.linen.BatchNorm(use_running_average=evaluating, **options)(x))
        return x


class NnxNet(nnx.Module):
    def __init__(self, variables):
        rngs = nnx.Rngs(0)
        self.dense = nnx.List([nnx.Linear(3, 3, use_bias=False, rngs=rngs) for _ in range(2)])
        self.norms = nnx.List([jbn.nnx.BatchNorm(3, use_running_average=True, rngs=rngs) for _ in range(2)])
        for i, dense in enumerate(self.dense):
            dense.kernel.set_value(variables["params"][f"Dense_{i}"]["kernel"])

    def __call__(self, x):
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = jnp.tanh(norm(dense(x)))
        return x


def variables():
    return Net().init(jax.random.key(0), X)


def by_hand(x):
    """What every batch norm sees in evaluation."""
    kernels = [layer["kernel"] for name, layer in variables()["params"].items() if "Dense" in name]
    seen = []
    for kernel in kernels:
        x = x @ kernel
        seen.append(jbn.moments(x))
        x = jnp.tanh(x / jnp.sqrt(1 + 1e-5))
    return seen


def data_free(moments):
    """Distance of each layer's moments from its running statistics, as data-free distillation has it."""
    return sum(jnp.sum(m.mean**2) + jnp.sum((m.var - 1) ** 2) for m in moments)


def test_a_loss_on_the_moments_of_every_layer_in_evaluation():
    def ours(x):
        _, new = Net().apply(variables(), x, mutable=["batch_moments"])
        return data_free(layer["moments"] for layer in new["batch_moments"].values())

    def in_nnx(x):
        model = NnxNet(variables())
        jbn.nnx.keep_batch_moments(model)
        model(x)
        return data_free(norm.batch_moments.get_value() for norm in model.norms)

    expected = jax.jit(jax.value_and_grad(lambda x: data_free(by_hand(x))))(X)
    assert np.abs(np.asarray(expected[1])).max() > 0.1
    for loss in (ours, in_nnx):
        assert_trees_close(jax.jit(jax.value_and_grad(loss))(X), expected, TOLERANCE)


def test_an_evaluation_that_is_not_asked_reduces_nothing():
    run = functools.partial(Net().apply, variables())
    for mutable, reduces in (((), False), (("batch_moments",), True)):
        text = jax.jit(functools.partial(run, mutable=mutable)).lower(X).as_text()
        assert ("stablehlo.reduce" in text) == reduces


def test_recalibration_takes_those_of_training_mode_alone():
    """Under a model that evaluates, nothing has been measured that training would see."""
    start = variables()
    with pytest.raises(ValueError, match="no batch norm had rows in training mode"):
        jbn.tools.recalibrate(Net().apply, start, [X], progress=False)
    traced = lambda v, x, **options: Net().apply(v, x, train=jnp.sum(x) > jnp.inf, **options)  # noqa: E731
    with pytest.raises(ValueError, match="no batch norm had rows in training mode"):
        jbn.tools.recalibrate(traced, start, [X], progress=False)
    with pytest.raises(ValueError, match="no batch norm had rows in training mode"):
        jbn.tools.recalibrate(functools.partial(Net().apply, blend=0.5), start, [X], progress=False)
    frozen = NnxNet(start)
    for norm in frozen.norms:
        norm.frozen, norm.blend = True, 0.5
    with pytest.raises(ValueError, match="no batch norm had rows in training mode"):
        jbn.tools.recalibrate(lambda model, x: model(x), frozen, [X], progress=False)
