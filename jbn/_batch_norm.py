"""batch_norm: measure, normalize, remember."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jbn import _checks
from jbn._affine import Inputs, Normalization, normalize_by
from jbn._devices import Reduction, axis_size, check_axis_name
from jbn._errors import naming
from jbn._ghost import normalize_groups
from jbn._measure import Measured
from jbn._moments import Moments, to_moments
from jbn._normalize import normalize
from jbn._options import Options, check_options, check_residual, check_several, check_statistics
from jbn._renorm import Reference, Renorm
from jbn._running import debiased, remember
from jbn._types import (
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    Dtype,
    Flag,
    Params,
    X,
    sharded_like,
)

_CALL = "batch_norm"

Stats = TypeVar("Stats", bound=BatchStats | None)


def batch_norm(
    params: Params | None,
    batch_stats: Stats,
    x: X,
    *,
    use_running_average: Flag,
    axis: Axes = -1,
    momentum: float | Array | None = 0.99,
    epsilon: float = 1e-5,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    mask: Array | None = None,
    unbiased: bool = False,
    debias: bool = False,
    skip_nonfinite: bool = False,
    virtual_batch_size: int | None = None,
    renorm: Renorm | None = None,
    activation: str | None = None,
    residual: Array | None = None,
    dtype: Dtype | None = None,
) -> tuple[Array, Stats]:
    """Normalizes x per channel, and returns it with the new running statistics.

        mean = E[x],  var = E[|x - mean|^2],  y = scale * (x - mean) / sqrt(var + epsilon) + bias

    In training the expectations are over every axis but the feature axes, and over the devices of
    `axis_name`; in evaluation mean and var are the running statistics, and nothing is updated.

    - Statistics are reduced in float32 or wider, about a shift near the data, whatever the dtype of x.
    - y is normalized by the biased variance, which is stored too unless `unbiased`.
    - Gradients, of any order, flow to x, scale, bias and residual; none through the returned statistics.
    - A channel with no row in this batch, or with one, is not updated; y is then bias.

    Args:
      params: a mapping with `scale`, `bias`, either or neither; None is neither. Each is [C], or has x's
        rank and broadcasts to x (conditional batch norm, arXiv 1707.00683).
      batch_stats: a mapping with `mean` and `var`, each [C], from `init`. None keeps none: x is then
        normalized by its batch in every mode.
      x: any shape of at least one axis; floating or complex (integers are taken as float32).
      use_running_average: True in evaluation, False in training; a traced bool works too.
      axis: the feature axis or axes.
      epsilon: added to the variance.

      How statistics are measured:
      axis_name: the mapped axis or axes (of `vmap`, `pmap` or `shard_map`) over which the batch is cut.
        Needed in training only. Under `jit`, sharded arrays need none.
      axis_index_groups: groups of devices of that axis that normalize together.
      mask: bool, or weights from 0 up: x's rank and broadcastable to x, or aligned with x's leading
        non-feature axes (`[N]`, `[N, T]`). Entries with 0 or False take no part in statistics or
        gradients, whatever they hold.
      virtual_batch_size: ghost batch norm (Hoffer et al. 2017, arXiv 1705.08741): each group of so many
        successive examples, along the first axis that is no feature axis, is normalized by itself. Groups
        stay on their device; the running statistics are updated once, by all rows of all devices together.
      renorm: batch renormalization towards the running statistics, `jbn.Renorm(r_max, d_max)` (Ioffe 2017,
        arXiv 1702.03275); of each group by itself, with virtual_batch_size.

      How they are remembered:
      momentum: weighs the OLD statistics, `new = momentum * old + (1 - momentum) * batch`; from 0 to 1,
        or a traced scalar. PyTorch's 0.1 is 0.9 here. None is cumulative: the statistics of all rows so far,
        pooled by count as in `jbn.merge`; needs `rows`, from `init(..., count=True)`.
      unbiased: whether the variance that is stored is multiplied by n / (n - 1), as in PyTorch; n counts the
        rows of all devices that take part.
      debias: whether evaluation (and renorm) divides out what is left of the initial 0 and 1:
        `mean / (1 - momentum^count)`, `(var - momentum^count) / (1 - momentum^count)` (Kingma and Ba 2014,
        arXiv 1412.6980, section 3). After one update it uses that batch's statistics, to the rounding of
        what is stored over 1 - momentum. Needs `count`.
      skip_nonfinite: whether a batch whose statistics hold NaN or inf in any channel updates nothing, on all
        devices that normalize together.

      What happens after:
      residual: added to y; x's rank, and broadcasts to x. Taken in y's dtype, and not masked: what it holds
        where x is masked, is added too.
      activation: "relu" gives `relu(y + residual)`: the values and gradients of the separate operations, of
        which the backward pass keeps nothing but the result.
      dtype: of y; None: x's.

    Returns:
      y, of x's shape, and batch_stats of the same structure, shapes and dtypes as they came.

    Raises:
      ValueError: an argument that does not fit, or not with another, and one value per channel in training.
      NameError: an axis name that nothing binds, in training.

    Example:
      >>> import jax.numpy as jnp, jbn
      >>> params, batch_stats = jbn.init(1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, batch_stats = jbn.batch_norm(params, batch_stats, x, use_running_average=False, momentum=0.9)
      >>> print(y[:, 0].round(3), batch_stats["mean"], batch_stats["var"])
      [-1.  1.] [0.2] [1.]

    Reference: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """
    options = Options(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
        debias=debias,
        skip_nonfinite=skip_nonfinite,
        virtual_batch_size=virtual_batch_size,
        renorm=renorm,
        activation=activation,
    )
    y, new_stats, _ = run(
        params, batch_stats, x, use_running_average, options, mask=mask, residual=residual, dtype=dtype
    )
    return y, new_stats


@naming("jbn.batch_norm")
def run(
    params: Params | None,
    batch_stats: Stats,
    x: X,
    use_running_average: Flag,
    options: Options,
    *,
    mask: Array | None = None,
    residual: Array | None = None,
    dtype: Dtype | None = None,
    starting: bool = False,
) -> tuple[Array, Stats, Moments | None]:
    """`batch_norm` as the layers call it: it also returns the moments of the batch, if it measured them.

    While a layer is `starting`, in `init`, one value per channel is welcome and no axis name is bound.
    """
    x, axes = _checks.check_x(_CALL, x, options.axis)
    weights = None if mask is None else _checks.check_mask(_CALL, mask, x, axes)
    scale, bias = _expanded_params(params, x, axes)
    dtype = _checks.check_dtype(_CALL, dtype, (x, scale, bias))
    residual = check_residual(_CALL, residual, x, dtype)
    check_options(_CALL, options, x, axes, weights, dtype)
    evaluating = _checks.check_flag(_CALL, use_running_average)
    if batch_stats is None:
        evaluating = False
    check_statistics(_CALL, options, batch_stats, x, axes, training=evaluating is not True)

    inputs = Inputs(x, weights, scale, bias, residual)
    if starting:
        options = dataclasses.replace(
            options, axis_name=None, axis_index_groups=None, virtual_batch_size=None
        )
    elif evaluating is not True:
        check_several(_CALL, options, x, axes, weights, certain=evaluating is False)
    axis_name, groups = check_axis_name(_CALL, options.axis_name, options.axis_index_groups)
    size = 1 if evaluating is True else axis_size(_CALL, axis_name, groups)
    config = Normalization(
        Reduction(axes, axis_name, groups, size), float(options.epsilon), dtype, options.activation
    )
    if evaluating is True:
        return _evaluate(config, inputs, batch_stats, options), batch_stats, None
    y, measured = _train(config, inputs, batch_stats, options)
    moments = to_moments(measured, axes)
    if batch_stats is None:
        return y, batch_stats, moments
    certain = weights is None and _has_several(x, config.reduction)
    seen = None if certain else lax.squeeze(measured.values > 1, axes)
    # Any: of the type of batch_stats
    new_stats: Any = remember(
        batch_stats,
        moments,
        options.momentum,
        seen,
        unbiased=options.unbiased,
        skip_nonfinite=options.skip_nonfinite,
    )
    if evaluating is not False:
        select: Any = functools.partial(jnp.where, evaluating)
        y = select(_evaluate(config, inputs, batch_stats, options), y)
        new_stats = jax.tree.map(select, batch_stats, new_stats)
        moments = jax.tree.map(lambda part: select(jnp.zeros_like(part), part), moments)
    return y, lax.stop_gradient(new_stats), moments


def _has_several(x: X, reduction: Reduction) -> bool:
    """Whether it is known while tracing that each channel has a variance."""
    sizes = [x.shape[axis] for axis in reduction.axes]
    return all(isinstance(size, int) for size in sizes) and math.prod(sizes) * reduction.size > 1


def _train(
    config: Normalization, inputs: Inputs, batch_stats: BatchStats | None, options: Options
) -> tuple[Array, Measured]:
    """y by the moments of the batch, or of each group of it; and those of the whole batch."""
    reference = None
    if options.renorm is not None and batch_stats is not None:
        limits = map(jnp.asarray, (options.renorm.r_max, options.renorm.d_max))
        reference = Reference(*_known(config, inputs.x, batch_stats, options), *limits)
    guess = None if batch_stats is None else _expanded(batch_stats["mean"], config, inputs.x)
    if options.virtual_batch_size is not None:
        return normalize_groups(config, inputs, reference, guess, options.virtual_batch_size)
    return normalize(config, inputs, reference, guess)


def _evaluate(config: Normalization, inputs: Inputs, batch_stats: Any, options: Options) -> Array:
    """y by the running statistics."""
    y: Array = normalize_by(config, inputs, *_known(config, inputs.x, batch_stats, options))
    return y


def _known(config: Normalization, x: X, batch_stats: BatchStats, options: Options) -> Iterator[Array]:
    """The mean and the variance of evaluation, with x's rank."""
    stats = debiased(batch_stats, options.momentum) if options.debias else batch_stats
    for name in ("mean", "var"):
        yield _expanded(stats[name], config, x)


def _expanded(statistic: Array, config: Normalization, x: X) -> Array:
    """A running statistic with x's rank."""
    return sharded_like(jnp.expand_dims(statistic, config.reduction.axes), x)


def _expanded_params(params: Params | None, x: X, axes: tuple[int, ...]) -> tuple[Array | None, Array | None]:
    """Scale and bias with x's rank, None where there is none."""
    params = {} if params is None else params
    _checks.check_entries(_CALL, "params", params, ("scale", "bias"))
    for name, value in params.items():
        _checks.check_param(_CALL, f"params[{name!r}]", value, x, axes)
    full = {name: v if jnp.ndim(v) == x.ndim else jnp.expand_dims(v, axes) for name, v in params.items()}
    scale, bias = (sharded_like(full[name], x) if name in full else None for name in ("scale", "bias"))
    return scale, bias
