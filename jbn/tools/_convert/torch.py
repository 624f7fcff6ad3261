"""One layer's arrays, from and to PyTorch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from jbn._core.errors import error, join_names, public
from jbn._core.types import BatchStats, Params
from jbn.tools._convert.arrays import read, write
from jbn.tools._convert.libraries import TORCH


@public
def from_torch(state: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """params and batch_stats of a PyTorch BatchNorm1d, 2d, 3d or SyncBatchNorm.

        params, batch_stats = from_torch(bn.state_dict())

    Arrays keep their values and dtypes, and evaluation gives the same outputs (`axis=1` for NCHW).

    - PyTorch stores the unbiased variance, n / (n - 1) times that of the batch, and evaluates with it as it
      is. So does jbn with the converted variance.
    - Its momentum weighs the NEW batch: 0.1 is 0.9 here. Its eps is 1e-5, as here. See `settings_from`.
    - `num_batches_tracked` becomes `count`, int32; a state without it gives none. PyTorch uses it with
      momentum=None only.

    Args:
      state: weight and bias as far as the layer has them, running_mean, running_var, each [C], and
        num_batches_tracked: tensors of any dtype and device, or arrays.

    Returns:
      params with `scale`, `bias`, and batch_stats with `mean`, `var`, `count`: copies, as JAX arrays.

    Raises:
      ValueError: entries that are missing or unknown, by name, or of a wrong shape or dtype.

    Example:
      >>> import numpy as np, jbn.tools
      >>> state = {"running_mean": np.float32([0.5, 2]), "running_var": np.float32([1, 4])}
      >>> params, batch_stats = jbn.tools.from_torch(state | {"num_batches_tracked": np.array(7)})
      >>> print(params, batch_stats["mean"], batch_stats["count"])
      {} [0.5 2. ] 7

    Reference: torch.nn.BatchNorm2d of PyTorch 2.
    """
    if isinstance(state, Mapping) and (names := [name for name in state if "." in str(name)]):
        raise error(
            "state",
            f"one of a whole model, with {join_names(names)}",
            "that of one batch norm, bn.state_dict()",
            "Convert the model with jbn.tools.from_torch_state_dict(state_dict, mapping).",
        )
    return read(TORCH, state)


@public
def to_torch(params: Params | None, batch_stats: BatchStats) -> dict[str, np.ndarray]:
    """The state_dict of a PyTorch batch norm: the inverse of `from_torch`, bit for bit.

        arrays = to_torch(params, batch_stats)
        bn.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})

    Of a bfloat16 array, which PyTorch cannot take from NumPy, the tensor is
    `torch.from_numpy(array.view("int16")).view(torch.bfloat16)`.

    Args:
      params: `scale` and `bias`, or `scale`, or neither: PyTorch has no bias without a weight.
      batch_stats: `mean`, `var`, and perhaps `count`. Without it there is no num_batches_tracked either, and
        load_state_dict leaves the layer's own as it is.

    Returns:
      NumPy arrays, copies: weight, bias, running_mean, running_var, and num_batches_tracked as int64.

    Raises:
      ValueError: as `from_torch`.

    Example:
      >>> import jbn.tools
      >>> print(jbn.tools.to_torch(*jbn.init(2))["running_var"])
      [1. 1.]
    """
    return torch_arrays(params, batch_stats)


def torch_arrays(params: Params | None, batch_stats: BatchStats) -> dict[str, np.ndarray]:
    """`to_torch` for a layer and for a model."""
    arrays = write(TORCH, params, batch_stats)
    if "num_batches_tracked" in arrays:
        arrays["num_batches_tracked"] = arrays["num_batches_tracked"].astype(np.int64)
    return arrays
