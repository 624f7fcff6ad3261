"""relu(y + residual) as one operation: values and gradients of the separate ones, and less to keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests.support.cases import CASES, REAL, assert_close, assert_trees_close, tolerance
from tests.support.doors import every_door

TOLERANCE = tolerance(np.float32)


def rounding(dtype):
    """How far two programs for one formula may be apart: XLA may fuse a product and a sum, to round once."""
    return 2 * float(jnp.finfo(dtype).eps)


def residual_of(case):
    values = np.random.default_rng(5).standard_normal(case.shape)
    return values.astype(case.dtype)


def separate(y, residual=None, activation=None):
    y = y if residual is None else y + residual
    return y if activation is None else jax.nn.relu(y)


def both_ways(case, after, evaluating=False, **settings):
    """ours and the separate operations, as functions of what has gradients: (params, x, residual)."""
    stats = case.make_batch_stats()
    common = case.settings | {"use_running_average": evaluating} | settings
    activation = "relu" if "activation" in after else None

    def ours(params, x, residual):
        residual = residual if "residual" in after else None
        return jbn.batch_norm(params, stats, x, activation=activation, residual=residual, **common)[0]

    def theirs(params, x, residual):
        y, _ = jbn.batch_norm(params, stats, x, **common)
        return separate(y, residual if "residual" in after else None, activation)

    return ours, theirs


BOTH = ("activation", "residual")
SEPARATE = [
    (case, (name,)) for case in REAL for name in BOTH if case.name in ("vector", "bfloat16", "masked entries")
]


@pytest.mark.parametrize("evaluating", [False, True], ids=["train", "evaluate"])
@pytest.mark.parametrize(
    ("case", "after"),
    [
        pytest.param(case, after, id=f"{case.name}-{'+'.join(after)}")
        for case, after in [*((case, BOTH) for case in REAL), *SEPARATE]
    ],
)
def test_values_and_gradients_of_the_separate_operations(case, after, evaluating):
    arguments = jax.tree.map(jnp.asarray, (case.make_params(), case.make_x(), residual_of(case)))
    found, expected = jax.jit(
        lambda *args: [
            (f(*args), jax.vjp(f, *args)[1](case.make_cotangent()))
            for f in both_ways(case, after, evaluating)
        ]
    )(*arguments)
    assert found[0].dtype == case.dtype
    assert_close(found[0], expected[0], rounding(case.dtype))
    assert_trees_close(found[1], expected[1], tolerance(case.dtype))


@pytest.mark.parametrize("case", [c for c in CASES if "complex" in c.name], ids=lambda case: case.name)
def test_complex_residuals(case):
    arguments = jax.tree.map(jnp.asarray, (case.make_params(), case.make_x(), residual_of(case)))
    found, expected = (jax.jit(f)(*arguments) for f in both_ways(case, ("residual",)))
    assert_close(found, expected, rounding(np.float32))


@pytest.mark.parametrize(
    "settings", [{}, {"virtual_batch_size": 8}, {"renorm": jbn.Renorm(2.0, 0.5)}], ids=str
)
def test_second_derivatives_of_the_separate_operations(settings):
    case = next(case for case in REAL if case.name == "vector")
    arguments = jax.tree.map(jnp.asarray, (case.make_params(), case.make_x(), residual_of(case)))
    cotangent = case.make_cotangent()

    def second(f):
        def gradient(*args):
            return jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a)) * cotangent), (0, 1, 2))(*args)

        return jax.grad(
            lambda *args: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(gradient(*args))), (0, 1, 2)
        )

    ours, theirs = both_ways(case, ("activation", "residual"), **settings)
    found, expected = (jax.jit(second(f))(*arguments) for f in (ours, theirs))
    assert_trees_close(found, expected, 10 * TOLERANCE)


@every_door
def test_layers_too(door):
    params, stats = jbn.init(3)
    x, residual = np.random.default_rng(0).standard_normal((2, 8, 3)).astype(np.float32)
    y, new = door(params, stats, x, residual=residual, activation="relu")
    plain, expected = door(params, stats, x)
    assert_close(y, separate(plain, residual, "relu"), rounding(np.float32))
    assert_trees_close(new, expected, 0.0)


def test_a_residual_of_another_dtype_is_taken_in_that_of_y():
    """All is exact here: a constant channel is bias, and 1 + 2**-12 as bfloat16 is 1."""
    params = {"bias": np.full(3, -1, np.float32)}
    residual = np.full((1, 3), 1 + 2**-12, np.float32)
    x = np.zeros((8, 3), jnp.bfloat16)
    y, _ = jbn.batch_norm(params, None, x, use_running_average=False, residual=residual)
    np.testing.assert_array_equal(y, np.zeros((8, 3), jnp.bfloat16), strict=True)


@pytest.mark.parametrize("after", [BOTH[:1], BOTH[1:], BOTH], ids="+".join)
def test_the_backward_pass_keeps_no_mask_of_relu(after):
    """x, and y where there is a residual: both are kept by their neighbours anyway."""
    x = jax.ShapeDtypeStruct((64, 128, 8), jnp.bfloat16)

    def block(x, residual):
        settings = {"activation": "relu" if "activation" in after else None}
        settings["residual"] = residual if "residual" in after else None
        return jbn.batch_norm(jbn.init(8)[0], None, x, use_running_average=False, **settings)[0]

    def forward(x, residual):
        y, pullback = jax.vjp(block, x, residual)
        return y, [leaf for leaf in jax.tree.leaves(pullback) if leaf.size >= x.size]

    jaxpr = jax.make_jaxpr(forward)(x, x).jaxpr
    y, *kept = jaxpr.outvars
    x = next(
        each.outvars[0] for each in jaxpr.eqns if each.primitive.name == "name"
    )  # that of x, and x itself
    assert set(kept) == ({x, y} if len(after) == 2 else {x})
