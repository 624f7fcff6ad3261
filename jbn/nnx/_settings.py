"""The settings of a layer as attributes: which there are, and how NNX holds them."""

from typing import Any

import jax
import numpy as np
from flax import nnx

FLAX_SETTINGS = (
    "use_running_average",
    "axis",
    "momentum",
    "epsilon",
    "dtype",
    "axis_name",
    "axis_index_groups",
    "use_fast_variance",
    "promote_dtype",
)
OWN_SETTINGS = {
    "frozen": False,
    "unbiased": False,
    "debias": False,
    "skip_nonfinite": False,
    "virtual_batch_size": None,
    "renorm": None,
    "activation": None,
    "blend": None,
}


def setting(value: Any) -> Any:
    """An attribute of a layer: arrays, as schedules give them, are data for NNX, and no constants."""
    arrays = (jax.Array, np.ndarray)
    return nnx.data(value) if any(isinstance(leaf, arrays) for leaf in jax.tree.leaves(value)) else value
