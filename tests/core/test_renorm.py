"""Batch renormalization, arXiv 1702.03275: the formula, its limits, and what it is with r = 1 and d = 0."""

import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jbn
from tests.support.cases import assert_close, assert_trees_close, tolerance
from tests.support.doors import every_door

TOLERANCE = tolerance(np.float32)
RNG = np.random.default_rng(0)
X = (RNG.standard_normal((16, 3)) * [0.1, 1, 8] + [-4, 0.5, 9]).astype(np.float32)
COTANGENT = RNG.standard_normal(X.shape).astype(np.float32)
PARAMS = {"scale": np.array([0.5, 1, 2], np.float32), "bias": np.array([0, 1, -1], np.float32)}
BATCH_STATS = {"mean": np.array([0.5, 0, 1], np.float32), "var": np.array([1, 2, 0.5], np.float32)}
LIMITS = [(1.0, 0.0), (1.5, 0.5), (3.0, 5.0), (np.inf, np.inf)]


def by_hand(params, x, r_max, d_max, mean=BATCH_STATS["mean"], var=BATCH_STATS["var"], r_min=None):
    """The paper's algorithm 1."""
    batch_mean, batch_var = jnp.mean(x, 0), jnp.var(x, 0)
    sigma_batch, sigma = jnp.sqrt(batch_var + 1e-5), jnp.sqrt(var + 1e-5)
    r = lax.stop_gradient(jnp.clip(sigma_batch / sigma, 1 / r_max if r_min is None else r_min, r_max))
    d = lax.stop_gradient(jnp.clip((batch_mean - mean) / sigma, -d_max, d_max))
    x_hat = (x - batch_mean[None]) / sigma_batch[None] * r[None] + d[None]
    return params["scale"][None] * x_hat + params["bias"][None]


@every_door
@pytest.mark.parametrize(("r_max", "d_max"), LIMITS)
def test_the_formula_of_the_paper(door, r_max, d_max):
    y, new = door(PARAMS, BATCH_STATS, X, momentum=0.9, renorm=jbn.Renorm(r_max, d_max))
    assert_close(y, by_hand(PARAMS, X, r_max, d_max), TOLERANCE)
    assert_trees_close(new, door(PARAMS, BATCH_STATS, X, momentum=0.9)[1], 0.0)  # stored as without


@pytest.mark.parametrize(("r_max", "d_max"), LIMITS)
def test_no_gradient_flows_through_the_correction(r_max, d_max):
    def ours(params, x):
        renorm = jbn.Renorm(r_max, d_max)
        return jbn.batch_norm(params, BATCH_STATS, x, use_running_average=False, renorm=renorm)[0]

    def first(f):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args)) * COTANGENT), (0, 1))

    def second(f):
        def of_gradient(*args):
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(first(f)(*args)))

        return jax.grad(of_gradient, (0, 1))

    def theirs(params, x):
        return by_hand(params, x, r_max, d_max)

    params = jax.tree.map(jnp.asarray, PARAMS)
    for order, factor in ((first, 10), (second, 1000)):  # channel 0 divides by 0.1 once per order
        assert_trees_close(order(ours)(params, X), order(theirs)(params, X), factor * TOLERANCE)


def test_limits_of_one_and_zero_are_batch_norm():
    for settings in ({}, {"mask": np.arange(16) < 9}, {"virtual_batch_size": 8}):
        common = {"use_running_average": False} | settings
        expected = jbn.batch_norm(PARAMS, BATCH_STATS, X, **common)
        found = jbn.batch_norm(PARAMS, BATCH_STATS, X, renorm=jbn.Renorm(1.0, 0.0), **common)
        assert_trees_close(found, expected, TOLERANCE)


def test_without_limits_training_computes_what_evaluation_computes():
    y, _ = jbn.batch_norm(
        PARAMS, BATCH_STATS, X, use_running_average=False, renorm=jbn.Renorm(np.inf, np.inf)
    )
    assert_close(y, jbn.batch_norm(PARAMS, BATCH_STATS, X, use_running_average=True)[0], TOLERANCE)


@every_door
def test_evaluation_knows_nothing_of_it(door):
    plain, _ = door(PARAMS, BATCH_STATS, X, True)
    y, _ = door(PARAMS, BATCH_STATS, X, True, renorm=jbn.Renorm(2.0, 1.0))
    np.testing.assert_array_equal(y, plain)


def test_limits_follow_a_schedule_without_compiling_again():
    compiled = []
    r_max, d_max = (optax.linear_schedule(start, end, 4) for start, end in ((1.0, 3.0), (0.0, 5.0)))

    @jax.jit
    def step(count):
        compiled.append(count)
        renorm = jbn.Renorm(r_max(count), d_max(count))
        return jbn.batch_norm(PARAMS, BATCH_STATS, X, use_running_average=False, renorm=renorm)[0]

    for count in range(5):
        expected = by_hand(PARAMS, X, 1 + count / 2, 5 * count / 4)
        assert_close(step(jnp.asarray(count)), expected, TOLERANCE)
    assert len(compiled) == 1


def test_limits_that_are_arrays_already_or_wrong_inside_of_jit():
    run = jax.jit(
        lambda renorm: jbn.batch_norm(PARAMS, BATCH_STATS, X, use_running_average=False, renorm=renorm)[0]
    )
    assert_close(run(jbn.Renorm(1.5, 0.5)), by_hand(PARAMS, X, 1.5, 0.5), TOLERANCE)

    def closed_over(*limits):
        renorm = jbn.Renorm(*limits)
        return jax.jit(
            lambda x: jbn.batch_norm(PARAMS, BATCH_STATS, x, use_running_average=False, renorm=renorm)[0]
        )(X)

    assert_close(closed_over(jnp.float32(1.5), jnp.float32(0.5)), by_hand(PARAMS, X, 1.5, 0.5), TOLERANCE)
    for wrong in ((0.5, 0.0), (1.0, jnp.float32(-1))):
        with pytest.raises(ValueError, match="r_max from 1 and d_max from 0 up"):
            closed_over(*wrong)


@pytest.mark.parametrize("devices", [4, 16])
def test_devices_share_the_correction(devices):
    def step(x):
        settings = {"use_running_average": False, "renorm": jbn.Renorm(1.5, 0.5), "axis_name": "data"}
        return jbn.batch_norm(PARAMS, BATCH_STATS, x, **settings)[0]

    y = jax.vmap(step, axis_name="data")(X.reshape(devices, -1, 3))
    assert_close(y.reshape(X.shape), by_hand(PARAMS, X, 1.5, 0.5), TOLERANCE)


def test_groups_are_corrected_each_by_itself():
    y, _ = jbn.batch_norm(
        PARAMS,
        BATCH_STATS,
        X,
        use_running_average=False,
        virtual_batch_size=4,
        renorm=jbn.Renorm(1.5, 0.5),
    )
    expected = [by_hand(PARAMS, part, 1.5, 0.5) for part in np.split(X, 4)]
    assert_close(y, np.concatenate(expected), TOLERANCE)


def test_masked_rows_take_no_part():
    mask = np.arange(16) < 9
    x = np.where(mask[:, None], X, np.float32(np.nan))
    y, _ = jbn.batch_norm(
        PARAMS, BATCH_STATS, x, use_running_average=False, mask=mask, renorm=jbn.Renorm(1.5, 0.5)
    )
    assert_close(y[:9], by_hand(PARAMS, X[:9], 1.5, 0.5), TOLERANCE)
    chex.assert_tree_all_finite(y)


def test_debiased_statistics_are_what_it_corrects_towards():
    _, start = jbn.init(3, count=True)
    _, stats = jbn.batch_norm(PARAMS, start, X, use_running_average=False, momentum=0.9)
    y, _ = jbn.batch_norm(
        PARAMS,
        stats,
        X + 1,
        use_running_average=False,
        momentum=0.9,
        debias=True,
        renorm=jbn.Renorm(1.5, 0.5),
    )
    expected = by_hand(PARAMS, X + 1, 1.5, 0.5, mean=X.mean(0), var=X.var(0))
    assert_close(y, expected, 10 * TOLERANCE)  # a variance of 0.01 was rounded next to 0.9


def test_of_no_row_y_is_bias():
    settings = {"use_running_average": False, "mask": np.zeros(16, bool), "renorm": jbn.Renorm(3.0, 5.0)}
    y, new = jbn.batch_norm(PARAMS, BATCH_STATS, X, **settings)
    np.testing.assert_array_equal(y, np.broadcast_to(PARAMS["bias"], X.shape))
    chex.assert_trees_all_equal(new, BATCH_STATS)


@every_door
@pytest.mark.parametrize("way", ["one row", "masked", "groups", "twice"])
def test_of_one_value_y_is_the_shift_of_the_correction(door, way):
    """x_hat is 0, so y = scale * d + bias, as the same row twice gives."""
    row, settings = X[:1], {"renorm": jbn.Renorm(np.inf, np.inf)}
    x = {"one row": row, "masked": X[:2], "groups": X[:2], "twice": np.repeat(row, 2, 0)}[way]
    if way == "masked":
        settings["mask"] = np.array([True, False])
    elif way == "groups":
        settings["virtual_batch_size"] = 1
    y, new = door(PARAMS, BATCH_STATS, x, **settings)
    d = (row - BATCH_STATS["mean"]) / np.sqrt(BATCH_STATS["var"] + 1e-5)
    assert_close(y[:1], PARAMS["scale"] * d + PARAMS["bias"], TOLERANCE)
    if way in ("one row", "masked"):
        chex.assert_trees_all_equal(new, BATCH_STATS)


@pytest.mark.parametrize("r_min", [0.0, 0.7, np.float32(1.0)])
def test_a_lower_limit_of_its_own(r_min):
    """As TensorFlow's and Keras's rmin; without one it is 1 / r_max."""
    settings = {"use_running_average": False}
    y, _ = jbn.batch_norm(PARAMS, BATCH_STATS, X, renorm=jbn.Renorm(1.5, 0.5, r_min), **settings)
    assert_close(y, by_hand(PARAMS, X, 1.5, 0.5, r_min=r_min), TOLERANCE)
    traced = jax.jit(
        lambda limit: jbn.batch_norm(PARAMS, BATCH_STATS, X, renorm=jbn.Renorm(1.5, 0.5, limit), **settings)[
            0
        ]
    )
    assert_close(traced(jnp.float32(r_min)), y, TOLERANCE)


def test_a_running_variance_of_zero_is_no_division_by_zero():
    stats = BATCH_STATS | {"var": np.zeros(3, np.float32)}
    settings = {"use_running_average": False, "epsilon": 0.0, "renorm": jbn.Renorm(3.0, 5.0)}
    chex.assert_tree_all_finite(jbn.batch_norm(PARAMS, stats, X, **settings)[0])


def test_keras_renormalizes_alike():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", exc_type=ImportError)
    layer = keras.layers.BatchNormalization(
        epsilon=1e-5, renorm=True, renorm_clipping={"rmin": 1 / 1.5, "rmax": 1.5, "dmax": 0.5}
    )
    layer.build(X.shape)
    values = {
        "gamma": PARAMS["scale"],
        "beta": PARAMS["bias"],
        "renorm_mean": BATCH_STATS["mean"],
        "renorm_stddev": np.sqrt(BATCH_STATS["var"] + 1e-5),
    }
    for name, value in values.items():
        getattr(layer, name).assign(value)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = np.asarray(layer(X, training=True))
    ours, _ = jbn.batch_norm(PARAMS, BATCH_STATS, X, use_running_average=False, renorm=jbn.Renorm(1.5, 0.5))
    assert_close(ours, theirs, 10 * TOLERANCE)  # Keras rounds the mean of channel 0, 40 deviations from 0
