"""How running statistics are updated: unbiased, by schedules, and not at all where there is no sense."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.nnx
from tests.support.cases import assert_close, assert_trees_close, loosely
from tests.support.doors import every_door, linen
from tests.support.running import BATCH_STATS, PARAMS, PARTS, ROWS, TOLERANCE, trained

RNG = np.random.default_rng(1)


@every_door
@pytest.mark.parametrize(("momentum", "expected"), [(0.0, PARTS[-1].mean(0)), (1.0, np.zeros(3))])
def test_momentum_0_and_1(door, momentum, expected):
    assert_close(trained(door, PARTS, momentum=momentum)["mean"], expected, TOLERANCE)


@every_door
def test_the_unbiased_variance_is_stored_and_the_biased_one_used(door):
    y, new = door(PARAMS, BATCH_STATS, PARTS[0], momentum=0.0, unbiased=True)
    assert_close(new["var"], PARTS[0].var(0, ddof=1), TOLERANCE)
    assert_close(y, (PARTS[0] - PARTS[0].mean(0)) / np.sqrt(PARTS[0].var(0) + 1e-5), TOLERANCE)


def test_pytorch_stores_the_same_unbiased_variance():
    torch = pytest.importorskip("torch")
    layer, batch_stats = torch.nn.BatchNorm1d(3, momentum=0.1), BATCH_STATS
    for x in PARTS:
        theirs = layer(torch.from_numpy(x)).detach().numpy()
        ours, batch_stats = jbn.batch_norm(
            PARAMS, batch_stats, x, use_running_average=False, momentum=0.9, unbiased=True
        )
        assert_close(ours, theirs, TOLERANCE)
    assert_close(batch_stats["var"], layer.running_var.numpy(), TOLERANCE)


def test_the_count_of_the_unbiased_variance_is_over_devices_and_masks():
    x = RNG.standard_normal((4, 5, 3)).astype(np.float32)
    mask = np.arange(20).reshape(4, 5) < 7

    def step(x, mask):
        settings = {"use_running_average": False, "momentum": 0.0, "unbiased": True}
        return jbn.batch_norm(None, BATCH_STATS, x, mask=mask, axis_name="data", **settings)[1]["var"]

    stored = jax.vmap(step, axis_name="data")(x, mask)
    assert_close(stored, np.broadcast_to(x[mask].var(0, ddof=1), (4, 3)), TOLERANCE)


@pytest.mark.parametrize("count", [0.0, 0.3, 1.0, 1.5])
def test_the_unbiased_variance_of_few_rows_is_finite(count):
    moments = jbn.Moments(np.full(1, count, np.float32), np.zeros(1, np.float32), np.ones(1, np.float32))
    new = jbn.update(jbn.init(1)[1], moments, momentum=0.0, unbiased=True)
    assert_close(new["var"], np.array([max(count, 1.0)]), TOLERANCE)


@every_door
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_a_batch_with_statistics_that_are_not_finite_is_skipped(door, bad, momentum):
    old = trained(door, PARTS[:1], momentum=momentum)
    x = PARTS[2].copy()
    x[3, 1] = bad  # the square of 3e38 overflows
    _, new = door(PARAMS, old, x, momentum=momentum, skip_nonfinite=True)
    assert_trees_close(new, old, 0.0)
    _, new = door(PARAMS, old, PARTS[2], momentum=momentum, skip_nonfinite=True)
    # Another program, in which a multiply-add may be fused and round once instead of twice.
    assert_trees_close(new, door(PARAMS, old, PARTS[2], momentum=momentum)[1], TOLERANCE)


@pytest.mark.parametrize("devices", [4, 16])
def test_one_decision_for_all_devices(devices):
    x = RNG.standard_normal((devices, 5, 3)).astype(np.float32)
    x[1, 2, 0] = np.nan

    def step(x):
        settings = {"use_running_average": False, "skip_nonfinite": True, "axis_name": "data"}
        return jbn.batch_norm(None, BATCH_STATS, x, **settings)[1]

    everywhere = jax.tree.map(lambda old: np.broadcast_to(old, (devices, *old.shape)), BATCH_STATS)
    chex.assert_trees_all_equal(jax.vmap(step, axis_name="data")(x), everywhere, strict=True)


def test_no_statistics_to_keep():
    y, none = jbn.batch_norm(
        None, None, PARTS[0], use_running_average=True, momentum=None, unbiased=True, skip_nonfinite=True
    )
    assert none is None
    assert_close(y, (PARTS[0] - PARTS[0].mean(0)) / np.sqrt(PARTS[0].var(0) + 1e-5), TOLERANCE)


@every_door
@pytest.mark.parametrize("settings", [{"momentum": None}, {"debias": True, "momentum": 0.9}], ids=str)
def test_a_traced_mode_remembers_alike(door, settings):
    for evaluating in (False, True):
        expected = door(PARAMS, BATCH_STATS, ROWS, evaluating, **settings)
        found = jax.jit(lambda flag: door(PARAMS, BATCH_STATS, ROWS, flag, **settings))(jnp.array(evaluating))
        assert_trees_close(found, expected, TOLERANCE)


@every_door
def test_a_momentum_of_1_keeps_and_of_0_forgets_what_is_not_finite(door):
    x = np.where(np.arange(24).reshape(8, 3) == 4, np.float32(np.nan), PARTS[0])
    stats = {name: BATCH_STATS[name] for name in ("mean", "var")}
    assert_trees_close(door(PARAMS, stats, x, momentum=1.0)[1], stats, 0.0)
    broken = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), stats)
    assert_close(door(PARAMS, broken, PARTS[0], momentum=0.0)[1]["mean"], PARTS[0].mean(0), TOLERANCE)


def test_counters_of_other_dtypes(x64):
    """As float64 rows and a small integer have them: they come back as they went in, and promote nothing."""
    stats = BATCH_STATS | {"count": np.int8(3), "rows": np.zeros(3, np.float32)}
    x = PARTS[0].astype(np.float64)
    _, new = jbn.batch_norm(PARAMS, stats, x, use_running_average=False, momentum=None)
    assert (new["count"].dtype, new["rows"].dtype) == (np.int8, np.float32)
    assert int(new["count"]) == 4


def test_a_layer_keeps_rows_in_float32():
    """In bfloat16, rows would stop at 256 times a batch."""
    stats = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim else leaf, BATCH_STATS)
    _, new = linen(PARAMS, stats, PARTS[0], momentum=None)
    assert new["rows"].dtype == np.float32


def test_statistics_that_float16_cannot_hold_are_skipped():
    stats = {name: value.astype(np.float16) for name, value in jbn.init(3)[1].items()}
    x = np.stack([np.full(3, 1e4, np.float32), np.zeros(3, np.float32)])  # a variance of 2.5e7
    settings = {"use_running_average": False, "skip_nonfinite": True}
    assert_trees_close(jbn.batch_norm(None, stats, x, **settings)[1], stats, 0.0)
    assert_trees_close(jbn.update(stats, jbn.moments(x), skip_nonfinite=True), stats, 0.0)
    x = np.stack(
        [np.full(3, 500, np.float32), np.zeros(3, np.float32)]
    )  # the unbiased variance is twice 62500
    settings |= {"momentum": 0.0, "unbiased": True}
    assert_trees_close(jbn.batch_norm(None, stats, x, **settings)[1], stats, 0.0)


@pytest.mark.parametrize("how", ["constructor", "replaced"])
def test_nnx_layers_take_schedules(how):
    settings = {
        "momentum": jnp.float32(0.5),
        "renorm": jbn.Renorm(jnp.float32(1.0), jnp.float32(0.0)),
    }
    if how == "constructor":
        layer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **settings)
    else:
        layer = jbn.nnx.replace_batch_norm(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), **settings)

    @nnx.jit
    @chex.assert_max_traces(1)
    def train(layer, x):
        return layer(x)

    with loosely():
        train(layer, PARTS[0])
        assert_close(layer.mean[...], 0.5 * PARTS[0].mean(0), TOLERANCE)
        layer.momentum = jnp.float32(0.0)
        layer.renorm = jbn.Renorm(jnp.float32(3.0), jnp.float32(1e3))
        y = train(layer, PARTS[0])
    assert_close(layer.mean[...], PARTS[0].mean(0), TOLERANCE)
    assert np.abs(np.asarray(y).mean(0)).min() > 0.1  # d is not 0 any more


def test_real_and_complex_moments_are_merged():
    """Also where promotion is strict, as it is in these tests."""
    real, other = jbn.moments(PARTS[0]), jbn.moments(PARTS[2] + np.complex64(1j))
    rows = np.concatenate([PARTS[0], PARTS[2] + 1j])
    merged = jbn.merge(real, other)
    assert_close(merged.mean, rows.mean(0), TOLERANCE)
    assert_close(merged.var, rows.var(0), TOLERANCE)
