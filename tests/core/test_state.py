"""State in, state out: what people met elsewhere, by behaviour."""

import functools

import chex
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.tools
from tests.support.cases import assert_close, assert_trees_close
from tests.support.doors import every_door
from tests.support.small_batch import BATCH_STATS, MASK, PARAMS, TOLERANCE, X, both, core


@pytest.mark.parametrize("axis_name", [None, "data"])
def test_one_layer_used_twice_in_a_step(axis_name):
    """From the same variables both are valid and differentiable; in sequence, the second update follows."""
    cotangent = np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)

    def one(params, batch_stats, x):
        apply = functools.partial(core, params=params, axis_name=axis_name)
        if axis_name is None:
            return apply(batch_stats, x)
        run = jax.vmap(apply, in_axes=(None, 0), out_axes=(0, None), axis_name="data")
        y, new = run(batch_stats, x.reshape(2, 4, 3))
        return y.reshape(8, 3), new

    def twice(params):
        y, new = one(params, BATCH_STATS, jnp.asarray(X))
        z, newer = one(params, new, 2 * jnp.asarray(X) + 1)
        return jnp.sum((y + z**2) * cotangent), newer

    gradient, newer = jax.jit(jax.grad(twice, has_aux=True))(PARAMS)
    mean, var, xhat = X.mean(0), X.var(0), (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5)
    assert_close(newer["mean"], 0.99 * 0.01 * mean + 0.01 * (2 * mean + 1), TOLERANCE)
    assert_close(newer["var"], 0.99 * (0.99 + 0.01 * var) + 0.01 * 4 * var, TOLERANCE)
    xhat2 = 2 * (X - X.mean(0)) / np.sqrt(4 * X.var(0) + 1e-5)
    assert_close(gradient["bias"], (cotangent * (1 + 2 * xhat2)).sum(0), TOLERANCE)
    assert_close(gradient["scale"], (cotangent * (xhat + 2 * xhat2**2)).sum(0), TOLERANCE)


def test_micro_batches_merged_are_one_update():
    x = (np.random.default_rng(0).standard_normal((64, 3)) * 2 + 5).astype(np.float32)
    merged = jbn.merge(*(jbn.moments(part) for part in np.split(x, 4)))
    new = jbn.update(BATCH_STATS, merged, momentum=0.9)
    assert_trees_close(new, core(BATCH_STATS, x, momentum=0.9)[1], TOLERANCE)


@both
@pytest.mark.parametrize("flag", [True, False])
def test_a_traced_mode_is_the_static_one(door, flag):
    run = jax.jit(functools.partial(door, params=PARAMS, mask=MASK))
    found = run(BATCH_STATS, X, jnp.array(flag))
    assert_trees_close(found, door(BATCH_STATS, X, flag, params=PARAMS, mask=MASK), TOLERANCE)


@both
@pytest.mark.parametrize("flag", [True, False, "traced"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_statistics_come_back_as_they_went_in_and_nothing_recompiles(door, flag, mask):
    settings = {} if mask is None else {"mask": mask}

    # Mode and donation as in a training loop: what comes back goes in again.
    @functools.partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(1)
    def step(stats, x, mode):
        return door(stats, x, mode if flag == "traced" else flag, PARAMS, **settings)

    batch_stats = jax.tree.map(jnp.array, BATCH_STATS)
    for _ in range(3):
        before = jax.tree.map(jax.typeof, batch_stats)
        y, batch_stats = step(batch_stats, X, jnp.array(True))
        assert jax.tree.map(jax.typeof, batch_stats) == before
        chex.assert_tree_all_finite(y)


@both
def test_every_kind_of_mapping_and_array(door):
    """Flax's frozen dictionaries and NumPy arrays, as checkpoints give them."""
    expected = door(BATCH_STATS, X, params=PARAMS)
    plain = jax.tree.map(np.asarray, (BATCH_STATS, PARAMS))
    for wrap in (flax.core.freeze, dict):
        y, new = door(wrap(plain[0]), X, params=wrap(plain[1]))
        assert_close(y, expected[0], 0.0)
        assert_trees_close(dict(new), dict(expected[1]), 0.0)
    _, new = core(flax.core.freeze(BATCH_STATS), X)
    assert isinstance(new, flax.core.FrozenDict)


def test_scale_and_bias_of_every_example():
    """Conditional batch norm: parameters of x's rank, with the gradients of a composition."""
    scale, bias, cotangent = np.random.default_rng(2).standard_normal((3, 8, 3)).astype(np.float32)

    def composed(params, x):
        y, _ = core(None, x)
        return jnp.sum((params["scale"] * y + params["bias"]) * cotangent)

    def direct(params, x):
        return jnp.sum(core(None, x, params=params)[0] * cotangent)

    params = {"scale": scale, "bias": bias}
    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(params, X) for f in (direct, composed))
    assert_trees_close(found, expected, TOLERANCE)


@pytest.mark.parametrize("evaluating", [False, True])
def test_variables_of_nnx_as_entries(evaluating):
    boxed_stats = {name: nnx.BatchStat(value) for name, value in BATCH_STATS.items()}
    boxed = {name: nnx.Param(value) for name, value in PARAMS.items()}
    y, new = core(boxed_stats, X, evaluating, boxed)
    expected = core(BATCH_STATS, X, evaluating, PARAMS)
    chex.assert_trees_all_equal((y, jax.tree.map(jnp.asarray, new)), expected)
    moments = jbn.moments(X)
    chex.assert_trees_all_equal(jbn.update(boxed_stats, moments), jbn.update(BATCH_STATS, moments))
    _, frozen = core(flax.core.freeze(boxed_stats), X, evaluating, flax.core.freeze(boxed))
    chex.assert_trees_all_equal(jax.tree.map(jnp.asarray, frozen), flax.core.freeze(expected[1]))


@pytest.mark.parametrize("compiled", [lambda run: run, jax.jit], ids=["as it is", "jit"])
def test_variables_of_nnx_in_moments(compiled):
    moments = jbn.moments(X)
    boxed = jax.tree.map(nnx.BatchStat, moments)
    merged = compiled(jbn.merge)(boxed, moments, boxed)
    chex.assert_trees_all_equal(merged, compiled(jbn.merge)(moments, moments, moments))
    new = compiled(jbn.update)(BATCH_STATS, boxed)
    chex.assert_trees_all_equal(new, compiled(jbn.update)(BATCH_STATS, moments))


SCALARS = {
    "mode": lambda value: {"evaluating": value > 0},
    "momentum": lambda value: {"momentum": value},
    "blend": lambda value: {"evaluating": True, "blend": value},
    "renorm": lambda value: {"renorm": jbn.Renorm(1 + value, value, 1 - value)},
}


@every_door
@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.usefixtures("flax_promotion")
def test_variables_of_nnx_as_scalars(door, name):
    """Held by a variable, in a compiled function or outside of one, a scalar is what it is by itself."""

    def run(value, hold):
        settings = jax.tree.map(hold, SCALARS[name](value))
        return door(PARAMS, BATCH_STATS, X, **settings)

    value = jnp.float32(0.25)
    expected = run(value, jnp.asarray)
    for find in (run, jax.jit(run, static_argnums=1)):
        assert_trees_close(find(value, nnx.Variable), expected, TOLERANCE)


def test_variables_of_nnx_as_scalars_of_moving_averages():
    old, new = BATCH_STATS, jax.tree.map(lambda value: value + 1, BATCH_STATS)
    variables, moments = {"batch_stats": BATCH_STATS}, {"": jbn.moments(X)}
    for move in (
        lambda share: jbn.update(BATCH_STATS, moments[""], momentum=share),
        lambda share: jbn.tools.apply_moments(variables, moments, momentum=share),
        lambda share: jbn.tools.ema(old, new, share),
    ):
        expected = move(0.75)
        for find in (move, jax.jit(move)):
            assert_trees_close(find(nnx.Variable(jnp.float32(0.75))), expected, TOLERANCE)


@both
def test_ahead_of_time_compilation(door):
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (BATCH_STATS, X))
    run = jax.jit(door).lower(*shapes).compile()
    assert_trees_close(run(BATCH_STATS, X), door(BATCH_STATS, X), TOLERANCE)


def step(params, x):
    """A whole training step, masked, with NaN where the mask takes out."""

    def loss(params, x):
        y, new = core(BATCH_STATS, x, params=params, mask=MASK)
        return jnp.sum(jnp.sin(y)), new

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


POISONED = np.where(MASK[:, None], X, np.float32(np.nan))


def test_no_tracer_leaks():
    with jax.checking_leaks():
        jax.block_until_ready(jax.jit(step)(PARAMS, POISONED))


def test_masked_nans_are_no_debugging_matter():
    with jax.debug_nans(True):
        (d_params, dx), new = jax.jit(step)(PARAMS, POISONED)
    chex.assert_tree_all_finite((d_params, dx, new))
    np.testing.assert_array_equal(dx[~MASK], np.zeros((3, 3), np.float32))


def test_without_jit():
    expected = jax.jit(step)(PARAMS, POISONED)
    with jax.disable_jit():
        assert_trees_close(step(PARAMS, POISONED), expected, TOLERANCE)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_any_rank(rank):
    """From 1 up: a vector is one value per channel, several of them under vmap."""
    x = np.random.default_rng(0).standard_normal((6,) * (rank - 1) + (3,)).astype(np.float32)
    if rank == 1:
        x = X
        y, new = jax.vmap(functools.partial(core, axis_name="data"), (None, 0), (0, None), axis_name="data")(
            BATCH_STATS, x
        )
    else:
        y, new = core(BATCH_STATS, x)
    axes = tuple(range(x.ndim - 1))
    assert_close(y, (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5), TOLERANCE)
    assert_close(new["mean"], 0.01 * x.mean(axes), TOLERANCE)
