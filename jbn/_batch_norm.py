"""init and batch_norm: measure, normalize, remember."""

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from jbn import _checks
from jbn._devices import Reduction
from jbn._moments import Moments, to_moments
from jbn._normalize import Normalization, normalize, normalize_by
from jbn._running import remember
from jbn._types import (
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    Dtype,
    Flag,
    Params,
    X,
    output,
    sharded_like,
)

_CALL = "batch_norm"

Stats = TypeVar("Stats", bound=BatchStats | None)


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
        raise _checks.error(
            "init", "features", repr(features), "an int or a tuple of ints", "Usually x.shape[-1]."
        )
    _checks.check_param_dtype("init", param_dtype)
    params = {}
    if use_scale:
        params["scale"] = jnp.ones(shape, param_dtype)
    if use_bias:
        params["bias"] = jnp.zeros(shape, param_dtype)
    batch_stats = {"mean": jnp.zeros(shape, jnp.float32), "var": jnp.ones(shape, jnp.float32)}
    if count:
        batch_stats |= {"count": jnp.zeros((), jnp.int32), "rows": jnp.zeros(shape, jnp.float32)}
    return params, batch_stats


def batch_norm(
    params: Params | None,
    batch_stats: Stats,
    x: X,
    *,
    use_running_average: Flag,
    axis: Axes = -1,
    momentum: float | Array = 0.99,
    epsilon: float = 1e-5,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    mask: Array | None = None,
    dtype: Dtype | None = None,
) -> tuple[Array, Stats]:
    """Normalizes x per channel, and returns it with the new running statistics.

        mean = E[x],  var = E[|x - mean|^2],  y = scale * (x - mean) / sqrt(var + epsilon) + bias

    In training the expectations are over every axis but the feature axes, and over the devices of
    `axis_name`; in evaluation mean and var are the running statistics, and nothing is updated.

    - Statistics are reduced in float32 or wider, about a shift near the data, whatever the dtype of x.
    - y is normalized by the biased variance, and the biased variance is stored.
    - Gradients, of any order, flow to x, scale and bias; none flow through the returned statistics.
    - A channel with no row in this batch, or with one, is not updated; y is then bias.

    Args:
      params: a mapping with `scale`, `bias`, either or neither; None is neither. Each is [C], or has x's
        rank and broadcasts to x (conditional batch norm).
      batch_stats: a mapping with `mean` and `var`, each [C], from `init`. None keeps none: x is then
        normalized by its batch in every mode.
      x: any shape of at least one axis; floating or complex (integers are taken as float32).
      use_running_average: True in evaluation, False in training; a traced bool works too.
      axis: the feature axis or axes.
      momentum: weighs the OLD statistics, `new = momentum * old + (1 - momentum) * batch`; from 0 to 1,
        or a traced scalar. PyTorch's 0.1 is 0.9 here.
      epsilon: added to the variance.
      axis_name: the mapped axis or axes (of `vmap`, `pmap` or `shard_map`) over which the batch is cut.
        Needed in training only. Under `jit`, sharded arrays need none.
      axis_index_groups: groups of devices of that axis that normalize together.
      mask: bool, or weights from 0 up: x's rank and broadcastable to x, or aligned with x's leading
        non-feature axes (`[N]`, `[N, T]`). Entries with 0 or False take no part in statistics or
        gradients, whatever they hold.
      dtype: of y; None: x's.

    Returns:
      y, of x's shape, and batch_stats of the same structure, shapes and dtypes as they came.

    Raises:
      ValueError: an argument that does not fit, and one value per channel in training.
      NameError: an axis name that nothing binds, in training.

    Example:
      >>> import jax.numpy as jnp, jbn
      >>> params, batch_stats = jbn.init(1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, batch_stats = jbn.batch_norm(params, batch_stats, x, use_running_average=False, momentum=0.9)
      >>> print(y[:, 0], batch_stats["mean"], batch_stats["var"])
      [-0.999995  0.999995] [0.2] [1.]

    Reference: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """
    y, new_stats, _ = run(
        params,
        batch_stats,
        x,
        use_running_average=use_running_average,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        mask=mask,
        dtype=dtype,
    )
    return y, new_stats


@_checks.naming("jbn.batch_norm")
def run(
    params: Params | None,
    batch_stats: Stats,
    x: X,
    *,
    use_running_average: Flag,
    axis: Axes,
    momentum: float | Array,
    epsilon: float,
    axis_name: AxisName | None,
    axis_index_groups: AxisIndexGroups | None,
    mask: Array | None,
    dtype: Dtype | None,
    starting: bool = False,
) -> tuple[Array, Stats, Moments | None]:
    """`batch_norm` as the layers call it: it also returns the moments of the batch, if it measured them.

    While a layer is `starting`, in `init`, one value per channel is welcome and no axis name is bound.
    """
    x, axes = _checks.check_x(_CALL, x, axis)
    weights = None if mask is None else _checks.check_mask(_CALL, mask, x, axes)
    scale, bias = _expanded_params(params, x, axes)
    _checks.check_settings(_CALL, momentum, epsilon, dtype, (x, scale, bias))
    axis_name, groups = _checks.check_axis_name(_CALL, axis_name, axis_index_groups)
    evaluating = _checks.check_flag(_CALL, use_running_average)
    if batch_stats is None:
        evaluating = False
    else:
        _checks.check_batch_stats(_CALL, batch_stats, x, axes)
    if starting:
        axis_name = groups = None
    elif evaluating is False and weights is None and axis_name is None:
        _checks.check_several(_CALL, x, axes)

    size = 1 if evaluating is True else _checks.axis_size(_CALL, axis_name, groups)
    config = Normalization(Reduction(axes, axis_name, groups, size), float(epsilon), output(x, dtype))
    inputs = (config, x, weights, scale, bias)
    new_stats: Any  # of the type of batch_stats
    moments: Moments | None
    if batch_stats is None:
        y, moments, _ = _train(*inputs)
        return y, batch_stats, moments
    if evaluating is True:
        y, new_stats, moments = _evaluate(*inputs, batch_stats), batch_stats, None
    else:
        y, moments, seen = _train(*inputs)
        new_stats = remember(batch_stats, moments, momentum, seen)
        if evaluating is not False:
            known = _evaluate(*inputs, batch_stats), batch_stats
            select = functools.partial(jnp.where, evaluating)
            y, new_stats = jax.tree.map(select, known, (y, new_stats))
            moments = jax.tree.map(lambda part: select(jnp.zeros_like(part), part), moments)
    return y, lax.stop_gradient(new_stats), moments


def _train(
    config: Normalization, x: X, weights: Array | None, scale: Array | None, bias: Array | None
) -> tuple[Array, Moments, Bool[Array, "*C"]]:
    """y by the moments of the batch, those moments, and which channels have the values for an update."""
    y, measured = normalize(config, x, weights, scale, bias)
    axes = config.reduction.axes
    return y, to_moments(measured, axes), lax.squeeze(measured.values > 1, axes)


def _evaluate(
    config: Normalization,
    x: X,
    weights: Array | None,
    scale: Array | None,
    bias: Array | None,
    batch_stats: BatchStats,
) -> Array:
    """y by the running statistics."""
    mean, var = (
        sharded_like(jnp.expand_dims(batch_stats[name], config.reduction.axes), x) for name in ("mean", "var")
    )
    y: Array = normalize_by(config, x, weights, mean, var, scale, bias)
    return y


def _expanded_params(params: Params | None, x: X, axes: tuple[int, ...]) -> tuple[Array | None, Array | None]:
    """Scale and bias with x's rank, None where there is none."""
    params = {} if params is None else params
    _checks.check_entries(_CALL, "params", params, ("scale", "bias"))
    for name, value in params.items():
        _checks.check_param(_CALL, f"params[{name!r}]", value, x, axes)
    full = {name: v if jnp.ndim(v) == x.ndim else jnp.expand_dims(v, axes) for name, v in params.items()}
    scale, bias = (sharded_like(full[name], x) if name in full else None for name in ("scale", "bias"))
    return scale, bias
