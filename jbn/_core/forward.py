"""Measure, normalize, remember: `batch_norm` behind its signature, as the layers call it too."""

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jbn._core import arguments as _checks
from jbn._core.affine import Inputs, Normalization, normalize_by
from jbn._core.devices import Reduction, axis_size, check_axis_name
from jbn._core.dtypes import BatchStats, Dtype, Flag, Params, X, describe, sharded_like, wide, working
from jbn._core.errors import ArgumentError
from jbn._core.ghost import normalize_groups
from jbn._core.moments import Moments, to_moments
from jbn._core.normalize import normalize
from jbn._core.options import (
    Options,
    check_groups,
    check_options,
    check_residual,
    check_several,
    check_statistics,
)
from jbn._core.renorm import Reference
from jbn._core.running import debiased, moving_average, remember
from jbn._core.scalars import check_flag, is_number
from jbn._core.statistics import Measured, known_rows, measure

Stats = TypeVar("Stats", bound=BatchStats | None)


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
    measuring: bool = False,
    layer: str | None = None,
) -> tuple[Array, Stats, Moments | None]:
    """`batch_norm` as the layers call it: it also returns the moments of the batch, if it measured them.

    In training it does, and in evaluation if `measuring`. While a layer is `starting`, in `init`, one value
    per channel is welcome and no axis name is bound; in training a `layer` of that name warns of it.
    """
    params, batch_stats = _checks.unwrapped(params), _checks.unwrapped(batch_stats)
    x, axes = _checks.check_x(x, options.axis)
    weights = None if mask is None else _checks.check_mask(mask, x, axes)
    scale, bias = _expanded_params(params, x, axes)
    dtype = _checks.check_dtype(dtype, (x, scale, bias))
    residual = check_residual(residual, x, dtype)
    check_options(options, x, axes, weights, dtype)
    evaluating = check_flag(use_running_average)
    if batch_stats is None:
        evaluating = False
    check_statistics(options, batch_stats, x, axes, training=evaluating is not True)

    inputs = Inputs(x, weights, scale, bias, residual)
    if starting:
        options = dataclasses.replace(
            options, axis_name=None, axis_index_groups=None, virtual_batch_size=None
        )
    elif evaluating is not True:
        check_groups(options, x, axes)
        try:
            if evaluating is False:
                check_several(options, x, axes, weights)
        except ArgumentError:
            if layer is None:
                raise
            _warn_of_one_value(layer, x, grouped=options.virtual_batch_size is not None)
    asked, measuring = measuring, measuring or evaluating is not True or _blends(options)
    axis_name, groups = check_axis_name(options.axis_name, options.axis_index_groups)
    size = axis_size(axis_name, groups) if measuring else 1
    config = Normalization(
        Reduction(axes, axis_name, groups, size), float(options.epsilon), dtype, options.activation
    )
    if evaluating is True:
        measured = measure(x, weights, config.reduction) if measuring else None
        y = _evaluate(config, inputs, batch_stats, options, measured)
        return y, batch_stats, to_moments(measured, axes) if asked and measured is not None else None
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
        y = select(_evaluate(config, inputs, batch_stats, options, measured), y)
        new_stats = jax.tree.map(select, batch_stats, new_stats)
        if not asked:
            moments = jax.tree.map(lambda part: select(jnp.zeros_like(part), part), moments)
    return y, lax.stop_gradient(new_stats), moments


def _warn_of_one_value(layer: str, x: X, *, grouped: bool) -> None:
    said = (
        f"virtual_batch_size is 1 for x = {describe(x)}, one value per channel in each group, which has no "
        "variance: y is bias. The statistics are those of the whole batch. Use larger groups."
        if grouped
        else f"x is {describe(x)}, one value per channel in training, which has no variance: y is bias, and "
        "nothing is updated. Use a larger batch, use_running_average=True, or axis_name to normalize over "
        "several devices."
    )
    warnings.warn(f"{layer}: {said}", stacklevel=4)


def _train(
    config: Normalization, inputs: Inputs, batch_stats: BatchStats | None, options: Options
) -> tuple[Array, Measured]:
    """y by the moments of the batch, or of each group of it; and those of the whole batch."""
    reference = None
    if options.renorm is not None and batch_stats is not None:
        r_max, d_max, r_min = vars(options.renorm).values()
        limits = map(jnp.asarray, (r_max, d_max, 1 / jnp.asarray(r_max) if r_min is None else r_min))
        reference = Reference(*_known(config, inputs.x, batch_stats, options), *limits)
    guess = None if batch_stats is None else _expanded(batch_stats["mean"], config, inputs.x)
    if options.virtual_batch_size is not None:
        return normalize_groups(config, inputs, reference, guess, options.virtual_batch_size)
    return normalize(config, inputs, reference, guess)


def _evaluate(
    config: Normalization, inputs: Inputs, batch_stats: Any, options: Options, measured: Measured | None
) -> Array:
    """y by the running statistics, blended with those of the batch if that is asked for."""
    mean, var = _known(config, inputs.x, batch_stats, options)
    if measured is None or options.blend is None or not _blends(options):
        known: Array = normalize_by(config, inputs, mean, var)
        return known
    # The mean stays in two parts, as in training: rounded to one float32 it would cost digits of y.
    kind = working(mean.dtype, measured.shift.dtype)
    shift, some = measured.shift.astype(kind), measured.total > 0
    shares = (options.blend, 1 - options.blend)
    rest, var = (
        jnp.where(some, moving_average(running, batch.astype(running.dtype), shares), running)
        for running, batch in (
            (mean.astype(kind) - shift, measured.rest),
            (var.astype(wide(kind)), measured.var),
        )
    )
    y: Array = normalize_by(config, inputs, shift, var, rest)
    return y


def _blends(options: Options) -> bool:
    """Whether evaluation looks at the batch: not for a share of 1 of the running statistics."""
    return options.blend is not None and not (is_number(options.blend) and options.blend == 1)


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
    _checks.check_entries("params", params, ("scale", "bias"))
    for name, value in params.items():
        _checks.check_param(f"params[{name!r}]", value, x, axes)
    full = {name: v if np.ndim(v) == x.ndim else jnp.expand_dims(v, axes) for name, v in params.items()}
    scale, bias = (sharded_like(full[name], x) if name in full else None for name in ("scale", "bias"))
    return scale, bias
