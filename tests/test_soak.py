"""Ten thousand training steps: nothing is compiled again, and memory does not grow."""

import gc
import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbn
from tests.cases import assert_close

STEPS, WARM = 10_000, 1_000
GROWTH = 16 * 2**20  # bytes; a leak of 2 KB a step
STATM = Path("/proc/self/statm")


def resident():
    """Bytes in memory now, and 0 where the system does not say.

    Below a high-water mark, which any test before in this process may have set, a leak would not show.
    """
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if STATM.exists() else 0


@pytest.mark.skipif(not STATM.exists(), reason="a system without /proc")
def test_a_leak_would_be_seen():
    before = resident()
    np.ones(16 * GROWTH, np.uint8)  # more than what follows, and gone at once
    leak = np.ones(4 * GROWTH, np.uint8)
    assert resident() - before > 3 * GROWTH
    del leak


def test_ten_thousand_steps():
    params, batch_stats = jbn.init(8, count=True)
    optimizer = optax.sgd(0.01)
    x = np.random.default_rng(0).standard_normal((16, 32, 8)).astype(np.float32)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, batch_stats, state, x):
        def loss(params):
            y, new = jbn.batch_norm(
                params, batch_stats, x, use_running_average=False, momentum=0.99, debias=True
            )
            return jnp.mean((y - 1) ** 2), new

        gradients, batch_stats_ = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), batch_stats_, state

    state = optimizer.init(params)
    for number in range(STEPS):
        params, batch_stats, state = step(params, batch_stats, state, x[number % 16])
        if number == WARM:
            gc.collect()
            arrays, memory = len(jax.live_arrays()), resident()
    gc.collect()
    assert len(jax.live_arrays()) == arrays
    assert resident() - memory < GROWTH
    assert int(batch_stats["count"]) == STEPS
    assert_close(params["bias"], np.ones(8), 1e-3)
    assert_close(batch_stats["mean"], x.reshape(-1, 8).mean(0), 0.05)
    assert_close(params["scale"], np.zeros(8), 1e-3)
