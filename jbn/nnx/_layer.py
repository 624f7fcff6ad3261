"""The layer for Flax NNX: variables, and one call into the core; and the variable for its moments."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes
from jax.nn.initializers import Initializer, ones, zeros
from jaxtyping import Array

from jbn._core.arguments import prepare_flag, prepare_x
from jbn._core.dtypes import promote_stats
from jbn._core.errors import error, named_errors
from jbn._core.forward import apply
from jbn._core.moments import Moments, checked_merge
from jbn._core.options import Options, check_debias_init, check_static, counters
from jbn._core.renorm import Renorm
from jbn._core.types import ActivationLike, Axes, AxisIndexGroups, AxisName, Dtype, Flag, X


class BatchMoments(nnx.BatchStat[Moments]):
    """The moments of a layer's batches: the counterpart of linen's collection `batch_moments`.

    As a filter it selects these alone. `nnx.BatchStat`, its base class, selects all statistics.

    Example:
      >>> import jbn.nnx
      >>> from flax import nnx
      >>> layer = jbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> jbn.nnx.keep_batch_moments(layer)
      >>> list(nnx.to_pure_dict(nnx.state(layer, jbn.nnx.BatchMoments)))
      ['batch_moments']
    """


class BatchNorm(nnx.Module):
    """Batch normalization, a drop-in for `flax.nnx.BatchNorm`.

        mean = E[x],  var = E[|x - mean|^2],  y = scale * (x - mean) / sqrt(var + epsilon) + bias

    The same constructor and call arguments, defaults, variables (`nnx.Param` scale and bias, `nnx.BatchStat`
    mean and var) and output dtypes: changing the import is the whole migration, and checkpoints load. The
    documentation's page on Flax lists what differs from it, and `jbn.linen.BatchNorm` the main points.

    Args:
      num_features: the number of channels.
      use_running_average: True in evaluation, False in training; `model.eval()` and `model.train()` set it,
        and an argument of the call has precedence.
      axis: the feature axis.
      momentum: weighs the OLD statistics, `new = momentum * old + (1 - momentum) * batch`; None: all rows.
        For a schedule start with a scalar array, and then set `layer.momentum` to the next ones.
      epsilon: added to the variance.
      dtype: of y; None: the one that x, the statistics, scale and bias promote to.
      param_dtype: of scale and bias.
      use_bias: whether there is a bias (beta).
      use_scale: whether there is a scale (gamma); a linear layer that follows makes it superfluous.
      bias_init: initializer of bias.
      scale_init: initializer of scale.
      axis_name: the mapped axis or axes (of `vmap`, `pmap`, `shard_map`) over which the batch is cut. Needed
        in training only. Under `jit`, sharded arrays need none.
      axis_index_groups: groups of devices of that axis that normalize together.
      use_fast_variance: accepted, and changes nothing: the variance is always the accurate one.
      promote_dtype: decides the dtype of y from (x, mean, var, scale, bias) and `dtype`; nothing is cast.
      rngs: keys of the initializers.
      bias_metadata: of the Param bias.
      scale_metadata: of the Param scale.
      mean_init: initializer of the running mean; None: zeros.
      var_init: initializer of the running variance; None: ones.
      frozen: uses the running statistics, writes nothing, and gives no gradient to scale and bias, whatever
        the mode. Weight decay still moves scale and bias: the labels of `jbn.tools.freeze` prevent that.
      unbiased: whether the variance that is stored is multiplied by n / (n - 1).
      debias: whether evaluation divides out what is left of the initial 0 and 1.
      skip_nonfinite: whether a batch whose statistics hold NaN or inf updates nothing.
      virtual_batch_size: how many examples are normalized together (ghost batch norm).
      renorm: limits of batch renormalization; for a schedule pass scalar arrays from the start. NNX
        cannot write into them: update a model with `nnx.state(model, nnx.Variable)`.
      activation: "relu", or an elementwise function such as `jax.nn.silu`; gives `activation(y + residual)`.
      blend: evaluation by `blend * running + (1 - blend) * batch` statistics, in frozen layers too; nothing
        is stored.

    `jbn.batch_norm` explains the last seven. `momentum=None` and `debias` add the variables `count` and
    `rows`, which a checkpoint has to hold: a count of 0 says that the statistics are the initial ones.

    After `jbn.nnx.keep_batch_moments(model)` the layer merges the batch's `jbn.Moments` into the variable
    `batch_moments`, for recalibration and gradient accumulation. It does so in evaluation too, for losses on
    the statistics of each layer's input.

    Example:
      >>> import jax.numpy as jnp, jbn.nnx
      >>> from flax import nnx
      >>> layer = jbn.nnx.BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0], [3.0]]))
      >>> print(y[:, 0].round(3), layer.mean[...])
      [-1.  1.] [0.2]

    Reference: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: float | Array | None = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        mean_init: Initializer | None = None,
        var_init: Initializer | None = None,
        frozen: bool = False,
        unbiased: bool = False,
        debias: bool = False,
        skip_nonfinite: bool = False,
        virtual_batch_size: int | None = None,
        renorm: Renorm | None = None,
        activation: ActivationLike | None = None,
        blend: float | Array | None = None,
    ) -> None:
        """Makes the variables; the arguments are those of the class."""
        shape = (num_features,)

        def param(init: Initializer, metadata: Mapping[str, Any]) -> nnx.Param[Array]:
            return nnx.Param(init(rngs.params(), shape, param_dtype), **metadata)

        self.scale = nnx.data(param(scale_init, scale_metadata) if use_scale else None)
        self.bias = nnx.data(param(bias_init, bias_metadata) if use_bias else None)

        def initial(init: Initializer | None, default: Callable[..., Array]) -> nnx.BatchStat[Array]:
            if init is None:  # and draw no key, so that the layers behind get those that Flax gives them
                return nnx.BatchStat(default(shape, jnp.float32))
            return nnx.BatchStat(init(rngs.params(), shape, jnp.float32))

        self.mean, self.var = initial(mean_init, jnp.zeros), initial(var_init, jnp.ones)
        counting = bool(counters(momentum, debias))
        self.count = nnx.data(nnx.BatchStat(jnp.zeros((), jnp.int32)) if counting else None)
        self.rows = nnx.data(nnx.BatchStat(jnp.zeros(shape, jnp.float32)) if counting else None)
        self.batch_moments: BatchMoments | None = nnx.data(None)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = as_attribute(momentum)
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.frozen = frozen
        self.unbiased = unbiased
        self.debias = debias
        self.skip_nonfinite = skip_nonfinite
        self.virtual_batch_size = virtual_batch_size
        self.renorm = as_attribute(renorm)
        self.activation = activation
        self.blend = as_attribute(blend)
        with named_errors(f"jbn.nnx.BatchNorm of {num_features} features"):
            check_debias_init(debias, mean_init, var_init)

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
          use_running_average: True in evaluation, False in training; None: what the layer was set to.
          mask: bool, or weights from 0 up: x's rank and broadcastable to x, or aligned with x's leading
            non-feature axes (`[N]`, `[N, T]`).
          residual: added to y, before `activation`; x's rank, and broadcasts to x.
          update_batch_stats: False uses the statistics of the batch in training, and writes nothing.

        Returns:
          y, of x's shape.

        Raises:
          ValueError: an argument that does not fit, or no mode at all.
          NameError: an axis name that nothing binds, in training.

        Warns:
          UserWarning: one value per channel in training: y is bias, and nothing is updated.
        """
        name = f"jbn.nnx.BatchNorm of {self.num_features} features"
        with named_errors(name):
            check_static("frozen", self.frozen)
            check_static("update_batch_stats", update_batch_stats)
            flag = True if self.frozen else self._mode(use_running_average)
            given = (("scale", self.scale), ("bias", self.bias))
            params = {entry: param[...] for entry, param in given if param is not None}
            x, axes = prepare_x(x, self.axis)
            y, batch_stats, moments = apply(
                x,
                axes,
                jax.lax.stop_gradient(params) if self.frozen else params,
                promote_stats({entry: variable[...] for entry, variable in self._running_stats().items()}, x),
                flag,
                Options.of(self),
                mask=mask,
                residual=residual,
                dtype=self._output_dtype(x, params),
                with_moments=self.batch_moments is not None
                and not getattr(self.batch_moments, "training_alone", False),
                layer=name,
            )
        if update_batch_stats and flag is not True:
            for entry, variable in self._running_stats().items():
                value = batch_stats[entry]
                if variable[...].dtype == value.dtype:
                    variable[...] = value
                else:  # complex or wide from now on
                    variable.set_value(value)
        if moments is not None and self.batch_moments is not None:
            with named_errors(name):
                moments = checked_merge((self.batch_moments.get_value(), moments))
            self.batch_moments.set_value(moments)
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the mode of a view of the model; called by `nnx.view`.

        Args:
          use_running_average: True in evaluation, False in training; None leaves the mode as it is.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _running_stats(self) -> dict[str, nnx.BatchStat[Array]]:
        """The running statistics, as many as the options need."""
        variables = {"mean": self.mean, "var": self.var, "count": self.count, "rows": self.rows}
        return {name: variable for name, variable in variables.items() if variable is not None}

    def _mode(self, argument: Flag | None) -> Flag:
        """The mode of the call, else of the layer."""
        flag = self.use_running_average if argument is None else argument
        if flag is None:
            raise error(
                "use_running_average",
                "missing",
                "it in the constructor or in the call",
                "Call model.train() or model.eval(), or pass use_running_average=False in training and "
                "True in evaluation.",
            )
        return prepare_flag(flag)

    def _output_dtype(self, x: X, params: Mapping[str, Array]) -> Dtype:
        """The dtype that Flax's rule gives y, or the one that the caller's `promote_dtype` gives."""
        arrays = (x, self.mean[...], self.var[...], params.get("scale"), params.get("bias"))
        promote = functools.partial(self.promote_dtype, dtype=self.dtype)

        def a_value(arrays: tuple[Array | None, ...]) -> Array:
            x, _, _, scale, bias = promote(arrays)
            return jnp.zeros((), dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype))

        with jax.numpy_dtype_promotion("standard"):  # also where promotion is strict
            return jax.eval_shape(a_value, arrays).dtype


def as_attribute(value: Any) -> Any:
    """A setting as NNX holds it: arrays, as schedules give them, are data and no constants."""
    arrays = (jax.Array, np.ndarray)
    return nnx.data(value) if any(isinstance(leaf, arrays) for leaf in jax.tree.leaves(value)) else value
