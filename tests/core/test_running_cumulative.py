"""Cumulative statistics, momentum=None: those of all rows as one batch."""

import functools

import jax
import numpy as np
import pytest

import jbn
from tests.support.cases import assert_close
from tests.support.doors import every_door
from tests.support.running import BATCH_STATS, PARAMS, PARTS, ROWS, TOLERANCE, trained

RNG = np.random.default_rng(1)


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
