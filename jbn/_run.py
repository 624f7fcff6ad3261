"""Measure, normalize, remember: `batch_norm` behind its signature, as the layers call it too."""

import dataclasses
import functools
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
from jbn._measure import Measured, known_rows
from jbn._moments import Moments, to_moments
from jbn._normalize import normalize
from jbn._options import Options, check_options, check_residual, check_several, check_statistics
from jbn._renorm import Reference
from jbn._running import debiased, remember
from jbn._scalars import check_flag
from jbn._types import BatchStats, Dtype, Flag, Params, X, sharded_like

_CALL = "batch_norm"

Stats = TypeVar("Stats", bound=BatchStats | None)


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
    evaluating = check_flag(_CALL, use_running_average)
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
    rows = known_rows(
        x, weights, axes
    )  # if it is several, each channel has a variance: none has to be left out
    seen = None if rows is not None and rows * size > 1 else lax.squeeze(measured.values > 1, axes)
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
