"""Ten thousand training steps: nothing is compiled again, and nothing is kept of a step."""

import gc
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbn
from tests.support.cases import assert_close

STEPS, WARM = 10_000, 1_000


def kept():
    """Objects that the garbage collector knows, and blocks of memory that Python's objects take."""
    gc.collect()
    return np.array([len(gc.get_objects()), sys.getallocatedblocks()])


def test_what_is_kept_of_each_step_would_be_seen():
    """An array is no object of the garbage collector, but takes a block."""
    before = kept()
    leaks = [(np.ones(3), []) for _ in range(STEPS - WARM)]
    assert (kept() - before > 8_000).all()
    del leaks


@pytest.mark.training
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
            arrays, before = len(jax.live_arrays()), kept()
    # One thing kept of each step would be 9,000. Bytes of the process are not asked for: they are the
    # allocator's and the system's affair.
    assert (kept() - before < 1_000).all()
    assert len(jax.live_arrays()) <= arrays
    assert int(batch_stats["count"]) == STEPS
    # The loss is a parabola: on every processor each step takes 0.25 % off what is left, so 1e-11 stays.
    assert_close(params["bias"], np.ones(8), 1e-3)
    assert_close(params["scale"], np.zeros(8), 1e-3)
    assert_close(batch_stats["mean"], x.reshape(-1, 8).mean(0), 0.05)
