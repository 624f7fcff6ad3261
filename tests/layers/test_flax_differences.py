"""Each difference from Flax's layers that docs/pages/migrate/flax.md lists: theirs, and ours."""

import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from tests.support.cases import assert_close, tolerance

pytestmark = pytest.mark.usefixtures("flax_promotion")

X = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)


def train(kind, x, mask=None, variables=None, **settings):
    """y and new statistics of one training step that forgets the old ones."""
    layer = kind(use_running_average=False, momentum=0.0, **settings)
    variables = variables or {"params": jbn.init(x.shape[-1])[0], "batch_stats": jbn.init(x.shape[-1])[1]}
    y, new = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, new["batch_stats"]


def test_variance_far_from_zero():
    x = X + np.float32(1e4)
    exact = x.var(0, dtype=np.float64)
    assert np.abs(train(nn.BatchNorm, x)[1]["var"] - exact).max() > 0.5
    assert_close(train(jbn.linen.BatchNorm, x)[1]["var"], exact, tolerance(np.float32))


def test_counts_over_devices():
    """Rows [1, 2, 3, 4] on one device and [10] on another: mean 4 and variance 10, not 6.25 and 14.69."""
    x = np.array([[1, 2, 3, 4], [10, 0, 0, 0]], np.float32)[..., None]
    mask = np.array([[True] * 4, [True, False, False, False]])[..., None]

    def stats(kind):
        step = jax.vmap(lambda x, mask: train(kind, x, mask, axis_name="data")[1], axis_name="data")
        return jax.tree.map(lambda leaf: leaf[:, 0], step(x, mask))

    assert_close(stats(nn.BatchNorm)["mean"], [6.25, 6.25], tolerance(np.float32))
    assert_close(stats(jbn.linen.BatchNorm)["mean"], [4.0, 4.0], tolerance(np.float32))
    assert_close(stats(jbn.linen.BatchNorm)["var"], [10.0, 10.0], tolerance(np.float32))


def test_a_batch_that_is_masked_out():
    mask = np.zeros((64, 1), bool)
    assert np.isnan(train(nn.BatchNorm, X, mask)[1]["mean"]).all()
    y, new = train(jbn.linen.BatchNorm, X, mask)
    chex.assert_tree_all_finite(y)
    np.testing.assert_array_equal(new["mean"], np.zeros(3, np.float32))


def test_gradients_of_masked_entries():
    """The padding of a batch has no gradient, even if the loss forgets to leave it out."""
    mask = np.arange(64)[:, None] < 48

    def gradient(kind):
        return jax.grad(lambda x: jnp.sum(train(kind, x, mask)[0] ** 3))(X)

    assert float(jnp.abs(gradient(nn.BatchNorm)[48:]).max()) > 0.1
    np.testing.assert_array_equal(gradient(jbn.linen.BatchNorm)[48:], np.zeros((16, 3), np.float32))


def test_float_masks_are_weights():
    weights = np.where(np.arange(64)[:, None] < 32, 1, 0.5).astype(np.float32)
    plain, weighted = X.mean(0), np.average(X, 0, np.broadcast_to(weights, X.shape))
    assert_close(train(nn.BatchNorm, X, weights)[1]["mean"], plain, tolerance(np.float32))
    assert_close(train(jbn.linen.BatchNorm, X, weights)[1]["mean"], weighted, tolerance(np.float32))


def test_masks_of_fewer_axes():
    """[N] is the mask of examples; to Flax it is one of channels where it has their number, else an error."""
    mask = np.arange(64) < 48
    with pytest.raises(ValueError, match="broadcast"):
        train(nn.BatchNorm, X, mask)
    assert_close(train(jbn.linen.BatchNorm, X, mask)[1]["mean"], X[:48].mean(0), tolerance(np.float32))
    as_many, square = np.array([True, True, False]), X[:3]
    theirs, ours = (train(kind, square, as_many)[1]["mean"] for kind in (nn.BatchNorm, jbn.linen.BatchNorm))
    np.testing.assert_array_equal(np.isnan(theirs), ~as_many)
    assert_close(ours, square[:2].mean(0), tolerance(np.float32))


def test_one_value_per_channel_in_training():
    """Flax stores its variance, 0, which evaluation then divides by."""
    np.testing.assert_array_equal(train(nn.BatchNorm, X[:1])[1]["var"], np.zeros(3, np.float32))
    with pytest.warns(UserWarning, match="one value per channel"):
        y, new = train(jbn.linen.BatchNorm, X[:1])
    np.testing.assert_array_equal(y, np.zeros((1, 3), np.float32))
    np.testing.assert_array_equal(new["var"], np.ones(3, np.float32))


def test_statistics_in_mixed_precision():
    """With dtype=bfloat16 the NNX layer of Flax rounds x before it measures it."""
    x = X + np.float32(100)
    theirs, ours = (
        kind(3, dtype=jnp.bfloat16, momentum=0.0, rngs=nnx.Rngs(0))
        for kind in (nnx.BatchNorm, jbn.nnx.BatchNorm)
    )
    theirs(jnp.asarray(x)), ours(jnp.asarray(x))
    exact = x.var(0, dtype=np.float64)
    assert np.abs(theirs.var[...] - exact).max() > 1e-3
    assert_close(ours.var[...], exact, tolerance(np.float32))


def test_reductions_are_in_float32_whatever_is_asked():
    x = (X * 0.1 + 5).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64).var(0)
    settings = {"force_float32_reductions": False, "param_dtype": jnp.bfloat16}
    assert np.abs(np.asarray(train(nn.BatchNorm, x, **settings)[1]["var"], np.float64) - exact).max() > 1e-3
    assert_close(train(jbn.linen.BatchNorm, x, **settings)[1]["var"], exact, tolerance(np.float32))


def test_the_mean_of_complex_input_starts_complex():
    x = (X + 1j * X[::-1]).astype(np.complex64)
    means = [
        kind(False).init(jax.random.key(0), x)["batch_stats"]["mean"]
        for kind in (nn.BatchNorm, jbn.linen.BatchNorm)
    ]
    assert [mean.dtype for mean in means] == [np.float32, np.complex64]


def test_the_mode_may_be_traced():
    stats = jbn.init(3)[1]

    def evaluate(kind, mode):
        variables = {"params": jbn.init(3)[0], "batch_stats": stats}
        return kind(momentum=0.0).apply(variables, X, mode, mutable=["batch_stats"])[1]["batch_stats"]["mean"]

    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(evaluate, static_argnums=0)(nn.BatchNorm, True)
    ours = jax.jit(evaluate, static_argnums=0)
    assert_close(ours(jbn.linen.BatchNorm, False), X.mean(0), tolerance(np.float32))
    np.testing.assert_array_equal(ours(jbn.linen.BatchNorm, True), np.zeros(3, np.float32))


def test_the_mode_is_a_bool():
    """An integer is often a mistake: a `train` flag that was meant for another argument."""
    variables = {"params": jbn.init(3)[0], "batch_stats": jbn.init(3)[1]}
    assert_close(nn.BatchNorm(1).apply(variables, X), X, 1e-4)
    with pytest.raises(ValueError, match="use_running_average is 1"):
        jbn.linen.BatchNorm(1).apply(variables, X)


def test_epsilon_is_static():
    traced = lambda kind: jax.jit(lambda epsilon: train(kind, X, epsilon=epsilon)[0])(1e-5)  # noqa: E731
    assert np.isfinite(traced(nn.BatchNorm)).all()
    with pytest.raises(ValueError, match="epsilon is float32"):
        traced(jbn.linen.BatchNorm)


def test_statistics_stay_in_float32_for_float64(x64):
    """Flax's turn into float64, which is a second compilation and no scan carry."""
    x = X.astype(np.float64)
    kinds = {nn.BatchNorm: np.float64, jbn.linen.BatchNorm: np.float32}
    for kind, dtype in kinds.items():
        assert train(kind, x)[1]["mean"].dtype == dtype


def test_statistics_come_back_to_float32_from_a_checkpoint_in_bfloat16():
    """They do in Flax's linen layer; in its NNX layer they stay, and an average of 101 never leaves 100."""
    x = (X + 101).astype(np.float32)
    theirs, ours = (kind(3, rngs=nnx.Rngs(0)) for kind in (nnx.BatchNorm, jbn.nnx.BatchNorm))
    for layer in (theirs, ours):
        layer.mean.set_value(jnp.full(3, 100, jnp.bfloat16))
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of the cast, for theirs
            for _ in range(100):
                layer(x)
    np.testing.assert_array_equal(theirs.mean[...], np.full(3, 100, jnp.bfloat16))
    assert ours.mean[...].dtype == np.float32
    assert_close(ours.mean[...], 100 + (x.mean(0) - 100) * (1 - 0.99**100), tolerance(np.float32))
    variables = {
        "params": jbn.init(3)[0],
        "batch_stats": jbn.init(3)[1] | {"mean": jnp.zeros(3, jnp.bfloat16)},
    }
    for kind in (nn.BatchNorm, jbn.linen.BatchNorm):
        assert train(kind, x, variables=variables)[1]["mean"].dtype == np.float32


def test_no_gradient_flows_through_the_statistics():
    gradients = [
        jax.grad(lambda x, kind=kind: jnp.sum(train(kind, x)[1]["mean"]))(X)
        for kind in (nn.BatchNorm, jbn.linen.BatchNorm)
    ]
    assert_close(gradients[0], np.full_like(X, 1 / 64), tolerance(np.float32))
    np.testing.assert_array_equal(gradients[1], np.zeros_like(X))
