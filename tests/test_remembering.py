"""How running statistics remember: cumulative, debiased, unbiased, and not at all where there is no sense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.nnx
from tests.cases import assert_close, assert_trees_close, loosely, tolerance
from tests.doors import every_door, linen

TOLERANCE = tolerance(np.float32)
RNG = np.random.default_rng(0)
PARTS = [(RNG.standard_normal((n, 3)) * 2 + 5 + n).astype(np.float32) for n in (8, 2, 20, 5)]
ROWS = np.concatenate(PARTS)
PARAMS, BATCH_STATS = jbn.init(3, count=True)


def trained(door, parts, batch_stats=BATCH_STATS, **settings):
    for x in parts:
        _, batch_stats = door(PARAMS, batch_stats, x, **settings)
    return batch_stats


def masked(x, size=24):
    """Padded with NaN, and the mask that takes it out."""
    padding = np.full((size - len(x), 3), np.nan, np.float32)
    return {"x": np.concatenate([x, padding]), "mask": np.arange(size) < len(x)}


@every_door
@pytest.mark.parametrize("unbiased", [False, True])
def test_cumulative_statistics_are_those_of_all_rows(door, unbiased):
    new = trained(door, PARTS, momentum=None, unbiased=unbiased)
    assert_close(new["mean"], ROWS.mean(0), TOLERANCE)
    assert_close(new["var"], ROWS.var(0, ddof=int(unbiased)), TOLERANCE)
    assert new["count"] == len(PARTS)
    np.testing.assert_array_equal(new["rows"], np.full(3, len(ROWS), np.float32))


@every_door
def test_cumulative_statistics_of_masked_batches(door):
    batch_stats = BATCH_STATS
    for part in PARTS:
        padded = masked(part)
        _, batch_stats = door(PARAMS, batch_stats, padded["x"], mask=padded["mask"], momentum=None)
    _, batch_stats = door(PARAMS, batch_stats, padded["x"], mask=np.zeros(24, bool), momentum=None)
    assert_close(batch_stats["var"], ROWS.var(0), TOLERANCE)
    assert batch_stats["count"] == len(PARTS)


def test_cumulative_statistics_of_channels_with_different_counts():
    mask = RNG.random((35, 3)) < 0.5
    batch_stats = BATCH_STATS
    for rows, keep in zip(np.split(ROWS, 5), np.split(mask, 5), strict=True):
        _, batch_stats = jbn.batch_norm(
            None, batch_stats, rows, use_running_average=False, mask=keep, momentum=None
        )
    # A channel with one row in a batch has no variance there, and is not updated.
    used = np.concatenate([keep & (keep.sum(0) > 1) for keep in np.split(mask, 5)])
    assert_close(batch_stats["mean"], np.stack([ROWS[used[:, c], c].mean() for c in range(3)]), TOLERANCE)
    assert_close(batch_stats["var"], np.stack([ROWS[used[:, c], c].var() for c in range(3)]), TOLERANCE)


def test_cumulative_statistics_as_a_scan_carry_and_over_devices():
    x = (RNG.standard_normal((6, 8, 4, 3)) * 3 + 1e3).astype(np.float32)  # [steps, devices, rows, C]

    @functools.partial(jax.pmap, axis_name="data", in_axes=1)
    def run(x):
        def step(batch_stats, x):
            _, new = jbn.batch_norm(
                PARAMS, batch_stats, x, use_running_average=False, momentum=None, axis_name="data"
            )
            return new, None

        return jax.lax.scan(step, BATCH_STATS, x)[0]

    for stats in (jax.tree.map(lambda leaf, i=i: leaf[i], run(x)) for i in (0, 7)):
        assert_close(stats["mean"], x.reshape(-1, 3).mean(0, dtype=np.float64), TOLERANCE)
        assert_close(stats["var"], x.reshape(-1, 3).astype(np.float64).var(0), TOLERANCE)


def test_update_is_cumulative_too():
    batch_stats = BATCH_STATS
    for x in PARTS:
        batch_stats = jbn.update(batch_stats, jbn.moments(x), momentum=None, unbiased=True)
    assert_close(batch_stats["var"], ROWS.var(0, ddof=1), TOLERANCE)


def test_pytorch_averages_the_batches_where_we_pool_the_rows():
    """Its mean is ours for equal batches; its variance leaves out the spread of the means."""
    torch = pytest.importorskip("torch")
    x = np.asarray([1, 2, 3, 4], np.float32)[:, None] + np.arange(3, dtype=np.float32)[:, None, None]
    layer = torch.nn.BatchNorm1d(1, momentum=None)
    batch_stats = jbn.init(1, count=True)[1]
    for batch in x:
        layer(torch.from_numpy(batch))
        batch_stats = jbn.update(batch_stats, jbn.moments(batch), momentum=None, unbiased=True)
    assert_close(batch_stats["mean"], layer.running_mean.numpy(), TOLERANCE)
    assert_close(batch_stats["mean"], np.array([3.5]), TOLERANCE)
    assert_close(layer.running_var.numpy(), np.array([1.6667], np.float32), 1e-4)
    assert_close(batch_stats["var"], x.reshape(-1, 1).var(0, ddof=1), TOLERANCE)


@every_door
@pytest.mark.parametrize(("momentum", "expected"), [(0.0, PARTS[-1].mean(0)), (1.0, np.zeros(3))])
def test_momentum_0_and_1(door, momentum, expected):
    assert_close(trained(door, PARTS, momentum=momentum)["mean"], expected, TOLERANCE)


@every_door
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_debiased_evaluation_after_one_update_is_by_that_batch(door, momentum):
    settings = {"momentum": momentum, "debias": True}
    new = trained(door, PARTS[:1], **settings)
    y, same = door(PARAMS, new, ROWS, True, **settings)
    expected = (ROWS - PARTS[0].mean(0)) / np.sqrt(PARTS[0].var(0) + 1e-5)
    assert_close(y, expected, TOLERANCE / (1 - momentum) ** 0.5)  # var was rounded next to momentum * 1
    assert_trees_close(same, new, 0.0)


@every_door
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_debiased_evaluation_before_any_update_is_the_identity(door, momentum):
    y, _ = door(PARAMS, BATCH_STATS, ROWS, True, momentum=momentum, debias=True, epsilon=0.0)
    np.testing.assert_array_equal(y, ROWS)


def test_debiased_statistics_are_the_weighted_average_of_the_batches():
    new = trained(functools.partial(jbn.batch_norm, use_running_average=False), PARTS, momentum=0.9)
    weights = 0.9 ** np.arange(len(PARTS))[::-1]
    mean = np.average([x.mean(0) for x in PARTS], axis=0, weights=weights)
    var = np.average([x.var(0) for x in PARTS], axis=0, weights=weights)
    y, _ = jbn.batch_norm(None, new, ROWS, use_running_average=True, momentum=0.9, debias=True)
    assert_close(y, (ROWS - mean) / np.sqrt(var + 1e-5), TOLERANCE)


def test_haiku_debiases_alike():
    hk = pytest.importorskip("haiku")
    with loosely():
        net = hk.transform_with_state(lambda *args: hk.BatchNorm(True, True, 0.9, eps=1e-5)(*args))  # noqa: PLW0108 - a module is made inside
        params, state = net.init(jax.random.key(0), PARTS[0], True)
        new = BATCH_STATS
        for x in PARTS:
            _, state = net.apply(params, state, None, x, True)
            _, new = jbn.batch_norm(PARAMS, new, x, use_running_average=False, momentum=0.9)
            theirs, _ = net.apply(params, state, None, ROWS, False)
            ours, _ = jbn.batch_norm(PARAMS, new, ROWS, use_running_average=True, momentum=0.9, debias=True)
            assert_close(ours, theirs, 10 * TOLERANCE)  # both have rounded a variance next to the other part


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
    assert_trees_close(new, door(PARAMS, old, PARTS[2], momentum=momentum)[1], 0.0)


@pytest.mark.parametrize("devices", [4, 16])
def test_one_decision_for_all_devices(devices):
    x = RNG.standard_normal((devices, 5, 3)).astype(np.float32)
    x[1, 2, 0] = np.nan

    def step(x):
        settings = {"use_running_average": False, "skip_nonfinite": True, "axis_name": "data"}
        return jbn.batch_norm(None, BATCH_STATS, x, **settings)[1]

    for leaf, old in zip(
        *map(jax.tree.leaves, (jax.vmap(step, axis_name="data")(x), BATCH_STATS)), strict=True
    ):
        np.testing.assert_array_equal(leaf, np.broadcast_to(old, leaf.shape))


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


def test_learned_statistics_without_a_count_are_not_debiased():
    stats = {name: BATCH_STATS[name] for name in ("mean", "var")}
    for settings in ({"debias": True}, {"momentum": None}):
        with pytest.raises(ValueError, match=r"Expected (count|rows) for"):
            linen(PARAMS, stats, PARTS[0], **settings)
        with pytest.raises(ValueError, match="counted their updates from the first one"):
            jbn.nnx.replace_batch_norm(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), **settings)


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
    traces = []

    @nnx.jit
    def train(layer, x):
        traces.append(1)
        return layer(x)

    with loosely():
        train(layer, PARTS[0])
        assert_close(layer.mean[...], 0.5 * PARTS[0].mean(0), TOLERANCE)
        layer.momentum = jnp.float32(0.0)
        layer.renorm = jbn.Renorm(jnp.float32(3.0), jnp.float32(1e3))
        y = train(layer, PARTS[0])
    assert_close(layer.mean[...], PARTS[0].mean(0), TOLERANCE)
    assert len(traces) == 1
    assert np.abs(np.asarray(y).mean(0)).min() > 0.1  # d is not 0 any more


def test_real_and_complex_moments_are_merged():
    """Also where promotion is strict, as it is in these tests."""
    real, other = jbn.moments(PARTS[0]), jbn.moments(PARTS[2] + np.complex64(1j))
    rows = np.concatenate([PARTS[0], PARTS[2] + 1j])
    merged = jbn.merge(real, other)
    assert_close(merged.mean, rows.mean(0), TOLERANCE)
    assert_close(merged.var, rows.var(0), TOLERANCE)
