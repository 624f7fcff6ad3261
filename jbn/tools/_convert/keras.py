"""One layer's arrays, from and to Keras."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from jbn._core.errors import public
from jbn._core.types import BatchStats, Params
from jbn.tools._convert.arrays import read, write
from jbn.tools._convert.libraries import KERAS


@public
def from_keras(state: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """params and batch_stats of a Keras BatchNormalization.

        params, batch_stats = from_keras({v.name: v.value for v in layer.weights})

    The names matter: of three arrays in `get_weights()`, a bare list, the first may be gamma or beta. Arrays
    keep their values and dtypes, and evaluation gives the same outputs.

    - Keras stores the biased variance, and its momentum weighs the OLD statistics, both as here.
    - Its epsilon is 1e-3 where the layer does not say otherwise, and 1e-5 here. See `settings_from`.
    - It has no counter. Of a layer with renorm=True leave out the arrays whose names begin with renorm_: they
      have no counterpart.

    Args:
      state: gamma and beta as far as the layer has them, moving_mean, moving_variance, each [C].

    Returns:
      params with `scale`, `bias`, and batch_stats with `mean`, `var`: copies, as JAX arrays.

    Raises:
      ValueError: entries that are missing or unknown, by name, or of a wrong shape or dtype.

    Example:
      >>> import numpy as np, jbn.tools
      >>> state = {"moving_mean": np.float32([0.5, 2]), "moving_variance": np.float32([1, 4])}
      >>> params, batch_stats = jbn.tools.from_keras(state | {"beta": np.float32([0.1, 0.2])})
      >>> print(params["bias"], batch_stats["var"])
      [0.1 0.2] [1. 4.]

    Reference: keras.layers.BatchNormalization of Keras 3.
    """
    return read(KERAS, state)


@public
def to_keras(params: Params | None, batch_stats: BatchStats) -> dict[str, np.ndarray]:
    """The variables of a Keras BatchNormalization by name: the inverse of `from_keras`, bit for bit.

        arrays = to_keras(params, batch_stats)
        layer.set_weights([arrays[v.name] for v in layer.weights])

    Args:
      params: `scale`, `bias`, either or neither.
      batch_stats: `mean` and `var`. A `count` is an error: Keras has no place for it.

    Returns:
      NumPy arrays, copies: gamma, beta, moving_mean, moving_variance.

    Raises:
      ValueError: as `from_keras`.

    Example:
      >>> import jbn.tools
      >>> print(jbn.tools.to_keras(*jbn.init(2))["gamma"])
      [1. 1.]
    """
    return write(KERAS, params, batch_stats)
