"""Gradients of x, scale and bias against the closed form in float64.

The cotangent is random and fixed: that of `sum(y)` is 0 for right and wrong code alike.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests.support import reference
from tests.support.cases import REAL, assert_close, by_name, tolerance

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(**by_name(REAL))
def test_gradients_in_training(case):
    x, params, batch_stats = case.make_x(), case.make_params(), case.make_batch_stats()
    cotangent = case.make_cotangent()

    @jax.jit
    def gradients(params, x):
        def y(params, x):
            return jbn.batch_norm(params, batch_stats, x, use_running_average=False, **case.settings)[0]

        return jax.vjp(y, params, x)[1](jnp.asarray(cotangent))

    d_params, dx = gradients(params, x)
    expected = reference.gradients(
        x, case.axis, params.get("scale"), case.epsilon, cotangent, case.make_mask()
    )
    assert dx.dtype == case.dtype
    assert_close(dx, expected.x, tolerance(case.dtype))
    for name, value in d_params.items():
        assert value.dtype == params[name].dtype
        assert_close(value, getattr(expected, name), tolerance(np.float32))


@pytest.mark.parametrize(**by_name(REAL))
def test_gradients_in_evaluation(case):
    x, params, batch_stats = case.make_x(), case.make_params(), case.make_batch_stats()
    cotangent, used = case.make_cotangent(), case.weights() > 0

    def y(params, x):
        return jbn.batch_norm(params, batch_stats, x, use_running_average=True, **case.settings)[0]

    d_params, dx = jax.jit(lambda *primals: jax.vjp(y, *primals)[1](jnp.asarray(cotangent)))(params, x)
    axes = reference.reduced_axes(x, case.axis)
    mean, var = (np.expand_dims(reference.exact(batch_stats[name]), axes) for name in ("mean", "var"))
    g, r = np.where(used, reference.exact(cotangent), 0), 1 / np.sqrt(var + case.epsilon)
    offset = np.where(used, x, 0).astype(np.float64) - mean
    scale = np.expand_dims(params["scale"], axes) if case.use_scale else 1
    assert_close(dx, g * scale * r, tolerance(case.dtype))
    if case.use_scale:
        assert_close(d_params["scale"], (g * offset * r).sum(axes), tolerance(np.float32))
    if case.use_bias:
        assert_close(d_params["bias"], g.sum(axes), tolerance(np.float32))


def test_no_gradient_flows_through_returned_statistics():
    params, batch_stats = jbn.init(3)
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)

    def through(batch_stats, x):
        _, new = jbn.batch_norm(params, batch_stats, x, use_running_average=False)
        return jnp.sum(new["mean"] + new["var"])

    gradients = jax.grad(through, argnums=(0, 1))(batch_stats, x)
    chex.assert_trees_all_equal(gradients, jax.tree.map(np.zeros_like, (batch_stats, x)), strict=True)


def test_moments_have_gradients():
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    mean, var = (
        jax.grad(lambda x, name=name: jnp.sum(getattr(jbn.moments(x), name) ** 2))(x)
        for name in ("mean", "var")
    )
    centred = x - x.mean(0, dtype=np.float64)
    assert_close(mean, np.broadcast_to(2 * x.mean(0) / 8, x.shape), tolerance(np.float32))
    assert_close(var, 2 * (centred**2).mean(0) * 2 * centred / 8, tolerance(np.float32))
