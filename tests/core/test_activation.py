"""Any elementwise function after batch norm: values and derivatives of the separate operations."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn._core import xla
from jbn._core.activation import DerivativeForm
from jbn._core.options import prepare_activation
from tests.support.cases import REAL, assert_close, assert_trees_close, tolerance
from tests.support.doors import every_door

TOLERANCE = tolerance(np.float32)
LEAKY = functools.partial(jax.nn.leaky_relu, negative_slope=0.1)
EXACT_GELU = functools.partial(jax.nn.gelu, approximate=False)


@jax.custom_vjp
def clipped(y):
    """A straight-through estimator that clips gradients: no factor of dy says what it does to dy."""
    return jnp.clip(y, -1, 1)


clipped.defvjp(lambda y: (clipped(y), None), lambda _, dy: (jnp.clip(dy, -0.1, 0.1),))


@jax.custom_jvp
def centered(y):
    return y


centered.defjvp(lambda y, y_dot: (y[0], y_dot[0] - jnp.mean(y_dot[0], 0, keepdims=True)))


def of_bfloat16(y):
    """Its last factor does not go with float32."""
    return jnp.exp(-y * y) * jnp.asarray(0.5, jnp.bfloat16)


FORMS = {
    "silu": (jax.nn.silu, DerivativeForm.REPEATED),
    "gelu": (jax.nn.gelu, DerivativeForm.REPEATED),
    "leaky relu": (LEAKY, DerivativeForm.REPEATED),
    "hard swish": (jax.nn.hard_swish, DerivativeForm.REPEATED),
    "tanh": (jnp.tanh, DerivativeForm.REPEATED_WIDE),
    "mish": (jax.nn.mish, DerivativeForm.REPEATED_WIDE),
    "exact gelu": (EXACT_GELU, DerivativeForm.STORED),
    "clipped": (clipped, DerivativeForm.SEPARATE),
}
FUNCTIONS = {name: function for name, (function, _) in FORMS.items()}
ONE_OF_EACH_FORM = {name: FUNCTIONS[name] for name in ("silu", "tanh", "exact gelu")}


def test_a_function_of_one_dtype_is_not_called_with_another():
    assert prepare_activation(of_bfloat16, np.dtype(jnp.bfloat16)).form is DerivativeForm.STORED
    assert_as_separate(named("bfloat16"), {"of bfloat16": of_bfloat16})


def named(name):
    return next(case for case in REAL if case.name == name)


@pytest.fixture(scope="module", params=["cpu", "gpu"], autouse=True)
def platform(request):
    """On a CPU the derivative is computed once; "gpu" takes the way of the others here too."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "gpu":
            patch.setattr(xla, "_STORING_PLATFORM", "tpu")
        yield request.param
    jax.clear_caches()


@pytest.mark.parametrize("name", FORMS)
def test_a_derivative_is_repeated_as_long_as_that_is_cheap(name):
    function, form = FORMS[name]
    assert prepare_activation(function, np.dtype(np.float32)).form is form


def test_relu_is_the_same_by_name_and_as_a_function():
    by_both = [prepare_activation(given, np.dtype(np.float32)) for given in ("relu", jax.nn.relu)]
    assert by_both[0] == by_both[1]
    assert by_both[0].form is DerivativeForm.RELU


def in_one(case, functions, *, with_residual=False, **settings):
    """ours and separate, as functions of all that has gradients: a list with y of each function."""
    stats, common = case.make_batch_stats(), {"use_running_average": False, **case.settings, **settings}

    def ours(params, x, residual):
        residual = residual if with_residual else None
        return [
            jbn.batch_norm(params, stats, x, activation=function, residual=residual, **common)[0]
            for function in functions.values()
        ]

    def separate(params, x, residual):
        y, _ = jbn.batch_norm(params, stats, x, residual=residual if with_residual else None, **common)
        return [function(y) for function in functions.values()]

    residual = np.random.default_rng(5).standard_normal(case.shape).astype(case.dtype)
    return ours, separate, jax.tree.map(jnp.asarray, (case.make_params(), case.make_x(), residual))


SETTINGS = {
    "residual": {"with_residual": True},
    "evaluation": {"use_running_average": True},
    "ghost batches": {"virtual_batch_size": 8},
    "renorm": {"renorm": jbn.Renorm(2.0, 0.5)},
}


def test_values_and_gradients_of_the_separate_operations():
    assert_as_separate(named("vector"), FUNCTIONS)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_with_other_options(settings):
    assert_as_separate(named("vector"), ONE_OF_EACH_FORM, **settings)


@pytest.mark.parametrize("name", ["bfloat16", "masked bfloat16", "masked entries", "fractional weights"])
def test_under_masks_and_in_16_bits(name):
    assert_as_separate(named(name), ONE_OF_EACH_FORM)


def assert_as_separate(case, functions, **settings):
    ours, separate, arguments = in_one(case, functions, **settings)
    cotangents = [case.make_cotangent()] * len(functions)

    def both(*arguments):
        return [(f(*arguments), jax.vjp(f, *arguments)[1](cotangents)) for f in (ours, separate)]

    found, expected = jax.jit(both)(*arguments)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    # The gradient is a sum over all the functions.
    assert_trees_close(found, expected, len(functions) * tolerance(case.dtype))


@pytest.mark.parametrize("name", ONE_OF_EACH_FORM)
def test_second_derivatives_of_the_separate_operations(name):
    case = named("vector")
    *both, arguments = in_one(case, {name: FUNCTIONS[name]})
    cotangent = case.make_cotangent()

    def second(f):
        def gradient(*args):
            return jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a)[0]) * cotangent), (0, 1))(*args)

        return jax.grad(
            lambda *args: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(gradient(*args))), (0, 1)
        )

    found, expected = jax.jit(lambda *args: [second(f)(*args) for f in both])(*arguments)
    assert_trees_close(found, expected, 10 * TOLERANCE)


def test_forward_mode_and_a_mapped_axis():
    """One batch cut in four, under a vmap with a name."""
    case = named("vector")
    ours, _, (params, x, _) = in_one(case, ONE_OF_EACH_FORM, mask=None)
    mapped, _, _ = in_one(case, ONE_OF_EACH_FORM, mask=None, axis_name="data")
    x_dot = jnp.asarray(case.make_cotangent())

    def whole(x, x_dot):
        return jax.jvp(lambda x: ours(params, x, None), (x,), (x_dot,))

    def cut(x, x_dot):
        parts = [jnp.reshape(part, (4, -1, *x.shape[1:])) for part in (x, x_dot)]
        apply = jax.vmap(lambda x: mapped(params, x, None), axis_name="data")
        return jax.tree.map(lambda y: jnp.reshape(y, x.shape), jax.jvp(apply, parts[:1], parts[1:]))

    assert_trees_close(*jax.jit(lambda *args: (cut(*args), whole(*args)))(x, x_dot), TOLERANCE)


@pytest.mark.parametrize("name", [name for name in FORMS if name != "clipped"])
def test_the_backward_pass_keeps_x_alone_and_the_residual(name):
    x = jax.ShapeDtypeStruct((64, 128, 8), jnp.bfloat16)

    def kept(with_residual):
        def block(x, residual):
            settings = {"activation": FUNCTIONS[name], "residual": residual if with_residual else None}
            return jbn.batch_norm(jbn.init(8)[0], None, x, use_running_average=False, **settings)[0]

        def pullback(x, residual):
            return [leaf for leaf in jax.tree.leaves(jax.vjp(block, x, residual)[1]) if leaf.size >= x.size]

        jaxpr = jax.make_jaxpr(pullback)(x, x).jaxpr
        named = next(each.outvars[0] for each in jaxpr.eqns if each.primitive.name == "name")
        return set(jaxpr.outvars), {named, jaxpr.invars[1]}

    found, _ = kept(with_residual=False)
    assert len(found) == 1
    found, x_and_residual = kept(with_residual=True)
    assert found == x_and_residual


def test_masked_entries_whose_derivative_is_nan_have_no_part():
    """GELU's derivative at 1e30 is NaN: a product of inf and 0."""
    x = np.array([[1.0], [2], [4], [1e30]], np.float32)
    mask = np.arange(4) < 3

    def y(x, params):
        y, _ = jbn.batch_norm(params, None, x, use_running_average=False, mask=mask, activation=jax.nn.gelu)
        return y[:3]

    params, _ = jbn.init(1)
    dy = np.array([[1.0], [-2], [3]], np.float32)
    dx, d_params = jax.jit(lambda x, params: jax.vjp(y, x, params)[1](dy))(x, params)
    assert_close(dx[3], np.zeros(1), 0.0)
    few = jax.jit(
        lambda x: jax.vjp(
            lambda x, p: jbn.batch_norm(p, None, x, use_running_average=False, activation=jax.nn.gelu)[0],
            x,
            params,
        )[1](dy)
    )(x[:3])
    assert_trees_close((dx[:3], d_params), few, TOLERANCE)


def test_gelu_is_that_of_jax():
    y = np.linspace(-6, 6, 49)
    with jax.enable_x64(True):
        both = [
            jax.jit(
                lambda y, f=f: (
                    f(y),
                    jax.vjp(f, y)[1](jnp.ones_like(y))[0],
                    jax.jvp(jax.grad(lambda y, f=f: jnp.sum(f(y))), (y,), (jnp.ones_like(y),))[1],
                )
            )(y)
            for f in (xla.gelu, jax.nn.gelu)
        ]
    # 1 + tanh(u), as JAX has it, rounds what is left below 0 to 1e-16, times y and the derivatives of u.
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@every_door
def test_layers_take_functions(door):
    params, stats = jbn.init(3)
    x, residual = np.random.default_rng(0).standard_normal((2, 8, 3)).astype(np.float32)
    y, new = door(params, stats, x, residual=residual, activation=LEAKY)
    plain, expected = door(params, stats, x, residual=residual)
    assert_close(y, LEAKY(plain), TOLERANCE)
    assert_trees_close(new, expected, 0.0)


def test_equal_partials_are_compiled_once():
    """They differ by identity; each call of a model may make one."""
    x, traced = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32), []

    def scaled(y, slope):
        traced.append(slope)
        return slope * y

    def call(slope):
        activation = functools.partial(scaled, slope=slope)
        jbn.batch_norm(None, None, x, use_running_average=False, activation=activation)

    for slope in (0.5, 0.5, 0.25):
        call(slope)
    assert traced.count(0.5) == traced.count(0.25) > 0


def test_partials_of_other_types_are_others():
    """float32(0.5) equals 0.5, but makes float32 of bfloat16."""
    x = np.ones((8, 3), jnp.bfloat16)

    def call(slope):
        activation = functools.partial(jnp.multiply, slope)
        with jax.numpy_dtype_promotion("standard"):
            return jbn.batch_norm(None, None, x, use_running_average=False, activation=activation)

    call(0.5)
    with pytest.raises(ValueError, match=r"makes float32\[3,5\] of bfloat16\[3,5\]"):
        call(np.float32(0.5))


MIXING = {
    "softmax": jax.nn.softmax,
    "less its mean": lambda y: y - jnp.mean(y, 0, keepdims=True),
    "by its largest": lambda y: y / jnp.max(y),
    "cumsum": lambda y: jnp.cumsum(y, 0),
    "sorted": lambda y: jnp.sort(y, -1),
    "reversed": lambda y: y[::-1],
    "rolled": lambda y: jnp.roll(y, 1, 0),
    "transposed twice": lambda y: jnp.sin(y.T).T,
    "pooled": lambda y: jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 3), (1, 1), "SAME"),
    "of rows": lambda y: jax.lax.map(jax.nn.softmax, y),
    "of rows, by vmap": jax.vmap(jax.nn.softmax),
    "product": lambda y: jnp.dot(y, np.eye(5, dtype=np.float32)),
    "by place": lambda y: y * jax.lax.broadcasted_iota(np.float32, y.shape, 0),
    "one entry": lambda y: y.at[0, 0].set(0.0),
    "padded": lambda y: jax.lax.pad(y, 0.0, ((1, -1, 0), (0, 0, 0))),
    "the largest": lambda y: jax.lax.top_k(y, y.shape[-1])[0],
    "noise": lambda y: jax.random.gamma(jax.random.key(0), jnp.abs(y)),
    "dropout": lambda y: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, y.shape), y, 0.0),
    "fourier": lambda y: jnp.real(jnp.fft.fft(y)),
    "glu": jax.nn.glu,
    "within branches": lambda y: jax.lax.cond(True, jax.nn.softmax, jnp.sin, y),
    "by its derivative": centered,
}
ELEMENTWISE = {
    "a polynomial": lambda y: jnp.polyval(np.array([0.5, 1.0, 0.0], np.float32), y),
    "a loop": lambda y: jax.lax.fori_loop(0, 3, lambda _, z: z - 0.1 * jnp.sin(z), y),
    "a loop until": lambda y: jax.lax.while_loop(lambda z: z[0] < 3, lambda z: (z[0] + 1, z[1] / 2), (0, y))[
        1
    ],
    "a branch": lambda y: jax.lax.cond(True, jnp.tanh, jnp.sin, y),
    "vmap": jax.vmap(jax.vmap(jnp.tanh)),
    "a constant": jnp.zeros_like,
    "a checkpoint": jax.checkpoint(jnp.tanh),
    "a scalar array": functools.partial(jnp.multiply, np.full((), 0.5, np.float32)),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_looks_at_other_entries_is_refused(name):
    with pytest.raises(ValueError, match="activation is the function"):
        prepare_activation(MIXING[name], np.dtype(np.float32))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_looks_at_each_entry_alone_is_taken(name):
    assert prepare_activation(ELEMENTWISE[name], np.dtype(np.float32)) is not None
