"""The strictest JAX there is, on 8 simulated devices; set before anything makes an array."""

import gc
import os
import sys
from pathlib import Path

import chex
import jax
import pytest

from tests.support.compiling import FAST_FLAGS

# Before the first array: XLA reads its flags once. Whoever sets some finds the programs compiled as he asks.
os.environ.setdefault("XLA_FLAGS", FAST_FLAGS)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # an example imports the files beside it


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """With several workers, a file's tests run in one of them: what they compile is compiled once."""
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadfile"


def pytest_collection_finish():
    """What importing made stays: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _eight_devices():
    """A test of many devices on one device would pass and prove nothing."""
    assert jax.device_count() == 8


@pytest.fixture(scope="module", autouse=True)
def _forget_what_was_compiled():
    """A file's programs are of no use to the next one, and keep gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _count_traces_anew():
    """chex knows functions by their source, which the cases of a test share."""
    chex.clear_trace_counter()


@pytest.fixture
def flax_promotion():
    """Flax's layers need implicit promotion of dtypes and ranks."""
    from tests.support.cases import loosely

    with loosely():
        yield


@pytest.fixture
def standard_promotion():
    """Optax mixes dtypes, as JAX lets it by default."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def x64():
    """float64 for the duration of a test: the precision in which derivatives are compared."""
    with jax.enable_x64(True):
        yield
