"""The layer for Flax linen: variables, and one call into the core."""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from flax.linen.dtypes import canonicalize_dtype
from jaxtyping import Array

from jbn._batch_norm import batch_norm
from jbn._checks import check_x, feature_shape
from jbn._types import Axes, AxisIndexGroups, AxisName, Dtype, Flag, X


class BatchNorm(nn.Module):
    """Batch normalization, a drop-in for `flax.linen.BatchNorm`.

        mean = E[x],  var = E[|x - mean|^2],  y = scale * (x - mean) / sqrt(var + epsilon) + bias

    The same constructor and call arguments, defaults, variables (`params`: scale, bias; `batch_stats`: mean,
    var) and output dtypes: changing the import is the whole migration, and checkpoints load. In training the
    statistics are the batch's, over every axis but `axis` and over `axis_name`, and the running ones are
    updated (make `batch_stats` mutable); in evaluation they are the running ones. It differs in four things:

    - Statistics are accurate: N(1e4, 1) has variance 1, where E[x^2] - E[x]^2 in float32 says 16.
    - Masked entries take no part at all, whatever they hold, and counts are over all devices. A mask may
      also be `[N]` or `[N, T]`, or hold fractional weights.
    - Statistics come from x as it is given and are kept in float32, whatever `dtype` says.
    - One value per channel in training is an error, and a fully masked batch updates nothing.

    Attributes:
      use_running_average: True in evaluation, False in training; here or in the call.
      axis: the feature axis or axes.
      momentum: weighs the OLD statistics, `new = momentum * old + (1 - momentum) * batch`.
      epsilon: added to the variance.
      dtype: of y; None: the one that x, scale and bias promote to.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias (beta).
      use_scale: whether there is a scale (gamma); a linear layer behind makes it superfluous.
      bias_init: initializer of bias.
      scale_init: initializer of scale.
      axis_name: the mapped axis or axes (of `vmap`, `pmap`, `shard_map`) over which the batch is cut. Needed
        in training only, not in `init`. Under `jit`, sharded arrays need none.
      axis_index_groups: groups of devices of that axis that normalize together.
      use_fast_variance: accepted, and changes nothing: the accurate way is as fast.
      force_float32_reductions: accepted, and changes nothing: reductions are in float32 or wider.

    Example:
      >>> import jax, jax.numpy as jnp, jbn.linen
      >>> layer = jbn.linen.BatchNorm(momentum=0.9)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> y, new = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> print(y[:, 0], new["batch_stats"]["mean"])
      [-0.999995  0.999995] [0.2]

    Reference: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float | Array = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: initializers.Initializer = initializers.zeros
    scale_init: initializers.Initializer = initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(self, x: X, use_running_average: Flag | None = None, *, mask: Array | None = None) -> Array:
        """Normalizes x, and in training updates the running statistics.

        Args:
          x: any shape of at least one axis.
          use_running_average: True in evaluation, False in training, if the constructor did not say.
          mask: bool, or weights from 0 up: x's rank and broadcastable to x, or aligned with x's leading
            non-feature axes (`[N]`, `[N, T]`).

        Returns:
          y, of x's shape.

        Raises:
          ValueError: an argument that does not fit.
          NameError: an axis name that nothing binds, in training.
        """
        merged = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        flag = cast(Flag, merged)
        x, axes = check_x("linen.BatchNorm", x, self.axis)
        features = feature_shape(x, axes)
        mean_dtype = jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32
        mean = self.variable("batch_stats", "mean", jnp.zeros, features, mean_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        params = {}
        if self.use_scale:
            params["scale"] = self.param("scale", self.scale_init, features, self.param_dtype)
        if self.use_bias:
            params["bias"] = self.param("bias", self.bias_init, features, self.param_dtype)
        with jax.numpy_dtype_promotion("standard"):  # Flax's rule, also where promotion is strict
            dtype = canonicalize_dtype(x, *params.values(), dtype=self.dtype)
        starting = self.is_initializing()
        if starting and mask is None:
            # A single row is welcome in `init`; behind a mask, the core does not count rows while tracing.
            mask = jnp.ones((), bool)
        running = {"mean": mean.value, "var": var.value}
        if jnp.iscomplexobj(x) and not jnp.iscomplexobj(mean.value):
            running["mean"] = mean.value.astype(mean_dtype)  # Flax starts it as a real zero
        y, batch_stats = batch_norm(
            params,
            running,
            x,
            use_running_average=flag,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=None if starting else self.axis_name,
            axis_index_groups=None if starting else self.axis_index_groups,
            mask=mask,
            dtype=dtype,
        )
        if not starting and flag is not True:
            mean.value, var.value = batch_stats["mean"], batch_stats["var"]
        return y
