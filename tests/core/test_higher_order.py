"""Derivatives of every order and mode, in float64, on one device and synchronised over two, masked too.

The reference is JAX's own differentiation of a two-pass definition that has no derivative rule, and closed
forms.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests.support.cases import assert_close, assert_trees_close
from tests.support.derivatives import (
    EPSILON,
    MASKS,
    MODES,
    ROWS,
    TOLERANCE,
    C,
    assert_equal,
    loss,
    modes,
    pair,
    point,
    training,
)
from tests.support.versions import needs
from tests.support.ways import ONE, Result, Way

pytestmark = pytest.mark.usefixtures("x64")


@modes
@pytest.mark.parametrize("mask", MASKS)
def test_forward_and_reverse(mode, mask):
    def derivatives(y, z, v):
        value, tangent = jax.jvp(y, (z,), (v,))
        return value, tangent, jax.linearize(y, z)[1](v), jax.vjp(y, z)[1](jnp.sin(value))[0]

    assert_equal(derivatives, *pair(mode, mask))


# Jacobians are vmaps of derivatives.
JACOBIAN = needs("jax", "0.9.0", "no vmap of a psum in a shard_map that checks its types", TypeError)
PAIRS = [
    ("one device", "weights"),
    ("vmap", "weights"),
    pytest.param("shard_map", "weights", marks=JACOBIAN),
    ("unchecked", "no mask"),
]


@pytest.mark.parametrize(("mode", "mask"), PAIRS)
def test_second_order(mode, mask):
    """Forward over reverse, reverse over reverse, forward over forward."""

    def derivatives(y, z, v):
        f = loss(y)
        return jax.hessian(f)(z), jax.jacrev(jax.jacrev(f))(z), jax.jacfwd(jax.jacfwd(f))(z)

    assert_equal(derivatives, *pair(mode, mask))


def along(derive, f, z, v):
    """The derivative of f at z along v, by `derive`."""
    return derive(lambda t: f(z + t * v))(0.0)


@pytest.mark.parametrize("kind", [bool, np.float64])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_cotangent_that_is_nan_where_masked_harms_no_second_derivative(activation, kind):
    """Reverse over reverse: 0 times NaN would reach the gradient of scale."""
    rng, mask = np.random.default_rng(0), np.arange(8) < 5
    x, cotangent = rng.standard_normal((2, 8, 3))
    params = {"scale": np.ones(3), "bias": np.zeros(3)}

    def second(hidden):
        def first(params, x):
            def y(params, x):
                settings = {"mask": mask.astype(kind), "activation": activation}
                return jbn.batch_norm(params, None, x, use_running_average=False, **settings)[0]

            pullback = jax.vjp(y, params, x)[1]
            gradients = pullback(jnp.where(mask[:, None], cotangent, hidden))
            return sum(jnp.sum(jnp.sin(part)) for part in jax.tree.leaves(gradients))

        return jax.grad(first, (0, 1))(params, x)

    assert_trees_close(second(np.nan), second(0.0), TOLERANCE)


@pytest.mark.parametrize(
    ("mode", "mask"),
    [("one device", "weights"), ("vmap", "no mask"), pytest.param("shard_map", "mask", marks=JACOBIAN)],
)
def test_third_and_fourth_order(mode, mask):
    forward, reverse = jax.jacfwd, jax.grad

    def derivatives(y, z, v):
        f = loss(y)

        def nest(*kinds):
            return along(lambda g: functools.reduce(lambda g, kind: kind(g), kinds, g), f, z, v)

        return (
            nest(reverse, reverse, reverse),
            nest(forward, forward, forward),
            nest(forward, reverse, forward, forward),
        )

    assert_equal(derivatives, *pair(mode, mask))


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=JACOBIAN if mode == "shard_map" else ()) for mode in MODES]
)
def test_four_orders_of_two_rows_are_the_closed_form(mode):
    """Of rows d and -d: y = d / sqrt(d^2 + e), and its derivatives."""
    d, e = 0.7, EPSILON
    s = d * d + e
    expected = [
        d * s**-0.5,
        e * s**-1.5,
        -3 * e * d * s**-2.5,
        3 * e * (4 * d * d - e) * s**-3.5,
        15 * e * d * (3 * e - 4 * d * d) * s**-4.5,
    ]

    def y(d):
        x = jnp.stack([d, -d])[:, None]
        return MODES[mode]({}, x)[0, 0]

    functions = [y]
    for derive in (jax.grad, jax.grad, jax.jacfwd, jax.grad):
        functions.append(derive(functions[-1]))
    assert_close(jax.jit(lambda d: jnp.stack([f(d) for f in functions]))(d), np.array(expected), TOLERANCE)


@pytest.mark.parametrize("mode", ["one device", "vmap"])
def test_a_constant_channel_has_the_closed_forms_curvature(mode):
    """Round-off, cut off at variance 0, must not cut off the derivative."""
    ours, reference = pair(mode, "no mask")
    z, v = point()
    z[: ROWS * C] = 1.5
    for f in (
        lambda y: jax.hessian(loss(y))(z),
        lambda y: jax.jacfwd(lambda z: jax.jvp(y, (z,), (v,))[1])(z),
    ):
        assert_close(jax.jit(f, static_argnums=0)(ours), jax.jit(f, static_argnums=0)(reference), TOLERANCE)


@pytest.mark.parametrize("axis_name", [None, "data"])
def test_the_variance_of_moments_is_a_quadratic_form(axis_name):
    """Its Hessian is 2 (I - 1/n) / n, and its third derivative 0."""
    x = point()[0][:ROWS]

    def var(x):
        measure = functools.partial(jbn.moments, axis_name=axis_name)
        if axis_name is None:
            return measure(x[:, None]).var[0]
        return jax.vmap(measure, axis_name=axis_name)(x.reshape(2, -1, 1)).var[0, 0]

    assert_close(jax.jit(jax.hessian(var))(x), 2 * (np.eye(ROWS) - 1 / ROWS) / ROWS, TOLERANCE)
    assert_close(jax.jit(jax.jacrev(jax.hessian(var)))(x), np.zeros((ROWS,) * 3), TOLERANCE)


@pytest.mark.parametrize("kind", ["vmap", "pmap", "shard_map", "unchecked"])
def test_a_gradient_penalty_on_two_devices_is_that_of_one(kind):
    """The gradient of a gradient, both taken inside."""

    def step(params, x, mask, cotangent, axis_name):
        def critic(x, params):
            used = mask[:, None] > 0
            y = training(params, x, mask, axis_name)
            return jnp.sum(jnp.where(used, jnp.tanh(y) * cotangent, 0.0)), y

        def penalty(params, x):
            slope, y = jax.grad(critic, has_aux=True)(x, params)
            return jnp.sum(jnp.sin(slope) ** 2), y

        (d_params, dx), y = jax.grad(penalty, argnums=(0, 1), has_aux=True)(params, x)
        return Result(y, dx, d_params, {})

    rng = np.random.default_rng(0)
    x, cotangent = rng.standard_normal((2, ROWS, C))
    mask = MASKS["weights"]
    params = {"scale": np.array([0.7, 1.3]), "bias": np.array([0.2, -0.4])}
    expected = ONE.jit(step)(params, x, mask, cotangent)
    found = Way("two devices", (2,), kind).jit(step)(params, x, mask, cotangent)
    assert np.abs(np.asarray(expected.dx)).max() > 1e-3
    assert_close(found.y, expected.y, TOLERANCE)
    assert_close(found.dx, expected.dx, TOLERANCE)
    for name, value in expected.d_params.items():
        assert_close(found.d_params[name], value, TOLERANCE)


def evaluation(params, x):
    batch_stats = {"mean": np.array([0.5, -1.0]), "var": np.array([2.0, 0.3])}
    return jbn.batch_norm(params, batch_stats, x, use_running_average=True, epsilon=EPSILON)[0]


def test_second_derivatives_in_evaluation():
    """y is linear in x, and in scale: of both together there is one, the deviation's inverse."""
    z, _ = point()
    x, params = z[: ROWS * C].reshape(ROWS, C), {"scale": np.array([0.7, 1.3]), "bias": np.array([0.2, -0.4])}
    second = jax.jit(jax.hessian(evaluation, argnums=(0, 1)))(params, x)
    np.testing.assert_array_equal(second[1][1], np.zeros((ROWS, C) * 3))
    np.testing.assert_array_equal(second[0]["scale"][0]["scale"], np.zeros((ROWS, C, C, C)))
    mixed = np.zeros((ROWS, C, C, ROWS, C))
    for row, channel in np.ndindex(ROWS, C):
        mixed[row, channel, channel, row, channel] = (np.array([2.0, 0.3])[channel] + EPSILON) ** -0.5
    assert_close(second[0]["scale"][1], mixed, TOLERANCE)
    np.testing.assert_array_equal(second[0]["bias"][1], np.zeros((ROWS, C, C, ROWS, C)))


def test_evaluation_is_per_example_under_vmap_of_derivatives():
    x = point()[0][: ROWS * C].reshape(ROWS, C)
    params = {"scale": np.array([0.7, 1.3]), "bias": np.array([0.2, -0.4])}
    slope = params["scale"] / np.sqrt(np.array([2.0, 0.3]) + EPSILON)
    jacobians = jax.vmap(jax.jacrev(evaluation, argnums=1), in_axes=(None, 0))(params, x)
    assert_close(jacobians, np.broadcast_to(np.diag(slope), (ROWS, C, C)), TOLERANCE)
    squares = jax.vmap(jax.grad(lambda x: jnp.sum(evaluation(params, x) ** 2)))(x)
    assert_close(squares, 2 * slope * np.asarray(evaluation(params, x)), TOLERANCE)
