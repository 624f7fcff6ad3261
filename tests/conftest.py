"""The strictest JAX there is, on 8 simulated devices; set before anything makes an array."""

import sys
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # an example imports the files beside it


@pytest.fixture(scope="session", autouse=True)
def _eight_devices():
    """A test of many devices on one device would pass and prove nothing."""
    assert jax.device_count() == 8


@pytest.fixture
def flax_promotion():
    """Flax's layers need implicit promotion of dtypes and ranks."""
    from tests.cases import loosely

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
