"""Parameters and running statistics of a new batch norm."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jbn._core.arguments import check_param_dtype
from jbn._core.dtypes import Dtype
from jbn._core.errors import error, names_errors


@names_errors
def init(
    features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    param_dtype: Dtype = jnp.float32,
    count: bool = False,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Parameters and running statistics of a new batch norm: it starts as the identity.

    They are the very collections that Flax keeps, so those of a Flax model go straight into `batch_norm`.

    Args:
      features: the number of channels, or a tuple with the sizes of several feature axes.
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).
      param_dtype: of scale and bias. Statistics are float32: in bfloat16 a running mean of 100 would never
        reach 101.
      count: whether batch_stats also keeps `count`, i32[], the number of updates, and `rows`, f32[C], the
        rows (or weights) seen.

    Returns:
      params with `scale` (ones) and `bias` (zeros), and batch_stats with `mean` (zeros) and `var` (ones),
      all of shape [C].

    Raises:
      ValueError: features that are not sizes.

    Example:
      >>> import jbn
      >>> params, batch_stats = jbn.init(2)
      >>> print(params["scale"], batch_stats["mean"])
      [1. 1.] [0. 0.]

    Reference: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """
    shape = tuple(features) if isinstance(features, Sequence) else (features,)
    if not shape or not all(
        type(n) is not bool and isinstance(n, (int, np.integer)) and n >= 0 for n in shape
    ):
        raise error("features", repr(features), "an int or a tuple of ints", "Usually x.shape[-1].")
    check_param_dtype(param_dtype)
    params = {}
    if use_scale:
        params["scale"] = jnp.ones(shape, param_dtype)
    if use_bias:
        params["bias"] = jnp.zeros(shape, param_dtype)
    batch_stats = {"mean": jnp.zeros(shape, jnp.float32), "var": jnp.ones(shape, jnp.float32)}
    if count:
        batch_stats |= {"count": jnp.zeros((), jnp.int32), "rows": jnp.zeros(shape, jnp.float32)}
    return params, batch_stats
