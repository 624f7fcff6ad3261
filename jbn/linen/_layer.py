"""The layer for Flax linen: variables, and one call into the core."""

import dataclasses
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import serialization
from flax.core.scope import DenyList
from flax.linen import initializers
from flax.linen.dtypes import canonicalize_dtype
from jaxtyping import Array

from jbn._core.arguments import feature_shape, prepare_flag, prepare_x
from jbn._core.dtypes import promote_stats
from jbn._core.errors import error, named_errors
from jbn._core.forward import apply
from jbn._core.moments import Moments, checked_merge
from jbn._core.options import Options, check_debias_init, check_static, counters
from jbn._core.renorm import Renorm
from jbn._core.types import ActivationLike, Axes, AxisIndexGroups, AxisName, Dtype, Flag, X

ONLY_TRAINING_MOMENTS: ContextVar[bool] = ContextVar("training_alone", default=False)
"""Whether moments are left in training mode alone: recalibration takes no others."""

serialization.register_serialization_state(
    Moments, lambda moments: dict(vars(moments)), lambda moments, state: dataclasses.replace(moments, **state)
)


class BatchNorm(nn.Module):
    """Batch normalization, a drop-in for `flax.linen.BatchNorm`.

        mean = E[x],  var = E[|x - mean|^2],  y = scale * (x - mean) / sqrt(var + epsilon) + bias

    The same constructor and call arguments, defaults, variables (`params`: scale, bias; `batch_stats`: mean,
    var) and output dtypes: changing the import is the whole migration, and checkpoints load. In training the
    statistics are the batch's, over every axis but `axis` and over `axis_name`, and the running ones are
    updated (make `batch_stats` mutable); in evaluation they are the running ones.
    It differs where Flax is wrong. These are the main points (the documentation's page on Flax lists all):

    - Statistics are accurate: N(1e4, 1) has variance 1, where E[x^2] - E[x]^2 in float32 says 0 to 24.
    - Masked entries take no part at all, whatever they hold, and counts are over all devices. A mask may
      also be `[N]` or `[N, T]`, or hold fractional weights.
    - Statistics come from x as it is given and are kept in float32, whatever `dtype` says.
    - One value per channel in training is a warning, and like a fully masked batch it updates nothing.

    Attributes:
      use_running_average: True in evaluation, False in training; here or in the call.
      axis: the feature axis or axes.
      momentum: weighs the OLD statistics, `new = momentum * old + (1 - momentum) * batch`; None: all rows.
      epsilon: added to the variance.
      dtype: of y; None: the one that x, scale and bias promote to.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias (beta).
      use_scale: whether there is a scale (gamma); a linear layer that follows makes it superfluous.
      bias_init: initializer of bias.
      scale_init: initializer of scale.
      axis_name: the mapped axis or axes (of `vmap`, `pmap`, `shard_map`) over which the batch is cut. Needed
        in training only, not in `init`. Under `jit`, sharded arrays need none.
      axis_index_groups: groups of devices of that axis that normalize together.
      use_fast_variance: accepted, and changes nothing: training on a GPU, the accurate way moves less memory
        than Flax's default.
      force_float32_reductions: accepted, and changes nothing: reductions are in float32 or wider.
      mean_init: initializer of the running mean.
      var_init: initializer of the running variance.
      frozen: uses the running statistics, writes nothing, and gives no gradient to scale and bias, whatever
        the mode. Weight decay still moves scale and bias: the labels of `jbn.tools.freeze` prevent that.
      unbiased: whether the variance that is stored is multiplied by n / (n - 1).
      debias: whether evaluation divides out what is left of the initial 0 and 1.
      skip_nonfinite: whether a batch whose statistics hold NaN or inf updates nothing.
      virtual_batch_size: how many examples are normalized together (ghost batch norm).
      renorm: limits of batch renormalization.
      activation: "relu", or an elementwise function such as `jax.nn.silu`; gives `activation(y + residual)`.
      blend: evaluation by `blend * running + (1 - blend) * batch` statistics, in frozen layers too; nothing
        is stored.

    `jbn.batch_norm` explains the last seven. `momentum=None` and `debias` add `count` and `rows` to the
    collection `batch_stats`, and a checkpoint has to hold these too.

    If `mutable` names the collection `batch_moments`, the layer merges the batch's `jbn.Moments` into those
    that are there: reports and gradient accumulation read them. It does so in evaluation too, and they have
    gradients, for losses on the statistics of each layer's input.

    Example:
      >>> import jax, jax.numpy as jnp, jbn.linen
      >>> layer = jbn.linen.BatchNorm(momentum=0.9)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> y, new = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> print(y[:, 0].round(3), new["batch_stats"]["mean"])
      [-1.  1.] [0.2]

    Reference: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float | Array | None = 0.99
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
    mean_init: initializers.Initializer = initializers.zeros
    var_init: initializers.Initializer = initializers.ones
    frozen: bool = False
    unbiased: bool = False
    debias: bool = False
    skip_nonfinite: bool = False
    virtual_batch_size: int | None = None
    renorm: Renorm | None = None
    activation: ActivationLike | None = None
    blend: float | Array | None = None

    @nn.compact
    def __call__(
        self,
        x: X,
        use_running_average: Flag | None = None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
        update_batch_stats: bool = True,
    ) -> Array:
        """Normalizes x, and in training updates the running statistics.

        Args:
          x: any shape of at least one axis.
          use_running_average: True in evaluation, False in training; if the constructor does not set it.
          mask: bool, or weights from 0 up: x's rank and broadcastable to x, or aligned with x's leading
            non-feature axes (`[N]`, `[N, T]`).
          residual: added to y, before `activation`; x's rank, and broadcasts to x.
          update_batch_stats: False uses the statistics of the batch in training, and writes nothing.

        Returns:
          y, of x's shape.

        Raises:
          ValueError: an argument that does not fit, or a `batch_stats` that is missing or immutable.
          NameError: an axis name that nothing binds, in training.

        Warns:
          UserWarning: one value per channel in training: y is bias, and nothing is updated.
        """
        name = "jbn.linen.BatchNorm" + (f" {'/'.join(self.path)!r}" if self.path else "")
        with named_errors(name):
            check_static("frozen", self.frozen)
            check_static("update_batch_stats", update_batch_stats)
            flag = True if self.frozen else self._mode(use_running_average)
            x, axes = prepare_x(x, self.axis)
            params = self._params(feature_shape(x, axes))
            running = self._running_stats(x, feature_shape(x, axes))
            initializing = self.is_initializing()
            writes = update_batch_stats and flag is not True and not initializing
            if writes and not self.is_mutable_collection("batch_stats"):
                raise error(
                    "batch_stats",
                    "immutable in training",
                    "a collection that can be updated",
                    "Call apply(..., mutable=['batch_stats']) and keep the statistics it returns, or pass "
                    "update_batch_stats=False or use_running_average=True.",
                )
            with jax.numpy_dtype_promotion("standard"):  # Flax's rule, also where promotion is strict
                dtype = canonicalize_dtype(x, *params.values(), dtype=self.dtype)
            y, batch_stats, moments = apply(
                x,
                axes,
                params,
                promote_stats({entry: variable.value for entry, variable in running.items()}, x),
                flag,
                Options.of(self),
                mask=mask,
                residual=residual,
                dtype=dtype,
                initializing=initializing,
                with_moments=self._moments_collection() is not None and not ONLY_TRAINING_MOMENTS.get(),
                layer=name,
            )
        if writes:
            for entry, variable in running.items():
                variable.value = batch_stats[entry]
        place = None if moments is None or initializing else self._moments_collection()
        if moments is not None and place is not None:
            if self.has_variable(place, "moments"):
                with named_errors(name):
                    moments = checked_merge((self.get_variable(place, "moments"), moments))
            self.put_variable(place, "moments", moments)
        return y

    @nn.nowrap
    def _moments_collection(self) -> str | None:
        """The collection for moments, if it is asked for by name: `mutable=True` gives those that Flax gives.

        Recalibration has them beside the statistics, to go with these through `nn.scan` and `nn.vmap`.
        """
        beside = ONLY_TRAINING_MOMENTS.get() and self.has_variable("batch_stats", "moments")
        if beside and self.is_mutable_collection("batch_stats"):
            return "batch_stats"
        asked = None if self.scope is None else self.scope.mutable
        named = not isinstance(asked, (bool, DenyList)) and self.is_mutable_collection("batch_moments")
        return "batch_moments" if named else None

    @nn.nowrap
    def _mode(self, argument: Flag | None) -> Flag:
        """use_running_average, said once: in the constructor or in the call."""
        given = [flag for flag in (self.use_running_average, argument) if flag is not None]
        if len(given) != 1:
            raise error(
                "use_running_average",
                "given twice" if given else "missing",
                "it in the constructor or in the call, once",
                "Pass use_running_average=False in training and True in evaluation.",
            )
        return prepare_flag(given[0])

    @nn.nowrap
    def _params(self, features: tuple[int, ...]) -> dict[str, Array]:
        params = {}
        if self.use_scale:
            params["scale"] = self.param("scale", self.scale_init, features, self.param_dtype)
        if self.use_bias:
            params["bias"] = self.param("bias", self.bias_init, features, self.param_dtype)
        if self.frozen:
            params = jax.lax.stop_gradient(params)
        return params

    @nn.nowrap
    def _running_stats(self, x: X, features: tuple[int, ...]) -> dict[str, nn.Variable[Array]]:
        """The running statistics. After the parameters, whose keys are then those that Flax gives."""
        if not self.has_variable("batch_stats", "mean") and not self.is_mutable_collection("batch_stats"):
            raise error(
                "batch_stats",
                "missing",
                "the collection that init returned, or that training updated",
                "Pass it beside the parameters: apply({'params': params, 'batch_stats': batch_stats}, ...).",
            )
        check_debias_init(self.debias, self.mean_init, self.var_init)
        kind = jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32
        key = self.make_rng("params") if self.has_rng("params") else None
        initial: dict[str, tuple[Any, ...]] = {
            "mean": (self.mean_init, key, features, kind),
            "var": (self.var_init, key, features, jnp.float32),
            "count": (jnp.zeros, (), jnp.int32),
            "rows": (jnp.zeros, features, jnp.float32),
        }
        # Not to a checkpoint without: a count of 0 beside learned statistics would be a lie.
        counting = [
            name
            for name in counters(self.momentum, self.debias)
            if self.has_variable("batch_stats", name) or not self.has_variable("batch_stats", "mean")
        ]
        return {
            name: self.variable("batch_stats", name, *initial[name]) for name in ("mean", "var", *counting)
        }
