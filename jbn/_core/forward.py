"""`batch_norm` behind its signature, as the layers call it too: prepare, train or evaluate, update."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from jbn._core.activation import DerivativeForm
from jbn._core.affine import Inputs, NormConfig, normalize_with
from jbn._core.arguments import Stats, check_batch_size, prepare
from jbn._core.dtypes import compute_dtype, reduction_dtype
from jbn._core.errors import ArgumentError, describe, warn_user
from jbn._core.moments import Moments, to_moments
from jbn._core.normalize import RunningHints, normalize, normalize_groups
from jbn._core.options import Options
from jbn._core.renorm import renorm_reference
from jbn._core.running import Decay, debiased, moving_average, update_running
from jbn._core.sharding import sharded_like
from jbn._core.statistics import ShiftedMoments, measure, static_count
from jbn._core.types import BatchStats, Dtype, Flag, Params, X

X_NAME = "jbn_x"
"""For `jax.checkpoint`: x as it was given, in training and in evaluation. Names leave no operation behind."""


def apply(
    x: X,
    axes: tuple[int, ...],
    params: Params | None,
    batch_stats: Stats,
    use_running_average: Flag,
    options: Options,
    *,
    mask: Array | None = None,
    residual: Array | None = None,
    dtype: Dtype | None = None,
    initializing: bool = False,
    with_moments: bool = False,
    layer: str | None = None,
) -> tuple[Array, Stats, Moments | None]:
    """y, new running statistics, and the moments of the batch: in training, and in evaluation if asked for.

    While a layer is `initializing`, one value per channel is welcome and no axis name is bound; in training
    a `layer` of that name warns of it.
    """
    if batch_stats is None:
        use_running_average = False
    measures = with_moments or use_running_average is not True or options.looks_at_batch
    config, inputs, stats, options = prepare(
        x,
        axes,
        params,
        batch_stats,
        options,
        mask=mask,
        residual=residual,
        dtype=dtype,
        initializing=initializing,
        in_layer=layer is not None,
        training=use_running_average is not True,
        measures=measures,
    )
    inputs = inputs._replace(x=checkpoint_name(inputs.x, X_NAME))
    if use_running_average is False and not initializing:
        _check_batch_size(options, inputs, axes, layer)
    if use_running_average is True:
        measured = measure(inputs.x, inputs.weights, config.reduction) if measures else None
        y = _evaluate(config, inputs, stats, options, measured)
        return y, stats, to_moments(measured, axes) if with_moments and measured is not None else None
    y, measured = _train(config, inputs, stats, options)
    moments = to_moments(measured, axes)
    if stats is None:
        return y, batch_stats, moments
    new_stats = _update(config, inputs, stats, options, measured, moments)
    if use_running_average is not False:
        select: Any = functools.partial(jnp.where, use_running_average)
        y = select(_evaluate(config, inputs, stats, options, measured), y)
        new_stats = jax.tree.map(select, stats, new_stats)
        if not with_moments:
            moments = jax.tree.map(lambda part: select(jnp.zeros_like(part), part), moments)
    return y, lax.stop_gradient(new_stats), moments


def _check_batch_size(options: Options, inputs: Inputs, axes: tuple[int, ...], layer: str | None) -> None:
    """One value per channel is an error of the function, and a warning of a layer."""
    try:
        check_batch_size(options, inputs, axes)
    except ArgumentError:
        if layer is None:
            raise
        _warn_of_one_value(layer, inputs.x, grouped=options.virtual_batch_size is not None)


def _warn_of_one_value(layer: str, x: X, *, grouped: bool) -> None:
    if grouped:
        text = (
            f"virtual_batch_size is 1 for x = {describe(x)}, one value per channel in each group, which has "
            "no variance: y is bias. The statistics are those of the whole batch. Use larger groups."
        )
    else:
        text = (
            f"x is {describe(x)}, one value per channel in training, which has no variance: y is bias, and "
            "nothing is updated. Use a larger batch, use_running_average=True, or axis_name to normalize "
            "over several devices."
        )
    warn_user(f"{layer}: {text}")


def _train(
    config: NormConfig, inputs: Inputs, batch_stats: BatchStats | None, options: Options
) -> tuple[Array, ShiftedMoments]:
    """y by the moments of the batch, or of each group of it; and those of the whole batch."""
    if config.activation is not None and config.derivative_form is DerivativeForm.SEPARATE:
        y, measured = _train(dataclasses.replace(config, activation=None), inputs, batch_stats, options)
        return config.activation.function(y), measured
    hints = RunningHints(None, None)
    if batch_stats is not None:
        reference = None
        if options.renorm is not None:
            reference = renorm_reference(options.renorm, *_eval_stats(config, inputs.x, batch_stats, options))
        hints = RunningHints(reference, _expanded(batch_stats["mean"], config, inputs.x))
    if options.virtual_batch_size is not None:
        return normalize_groups(config, inputs, hints, options.virtual_batch_size)
    return normalize(config, inputs, hints)


def _evaluate(
    config: NormConfig,
    inputs: Inputs,
    batch_stats: BatchStats,
    options: Options,
    measured: ShiftedMoments | None,
) -> Array:
    """y by the running statistics, blended with those of the batch if that is asked for."""
    mean, var = _eval_stats(config, inputs.x, batch_stats, options)
    delta = None
    if measured is not None and options.looks_at_batch:
        mean, var, delta = _blended(mean, var, measured, options.blend)
    y: Array = normalize_with(config, inputs, mean, var, delta)
    return y


def _blended(mean: Array, var: Array, measured: ShiftedMoments, blend: Any) -> tuple[Array, Array, Array]:
    """blend * running + (1 - blend) * batch, and the running statistics alone where the batch has no row.

    The mean stays in two parts, as in training: rounded to one float32 it would cost digits of y.
    """
    dtype = compute_dtype(mean.dtype, measured.shift.dtype)
    shift, has_rows = measured.shift.astype(dtype), measured.weight > 0
    decay = Decay(blend, 1 - blend)
    delta, var = (
        jnp.where(has_rows, moving_average(running, batch.astype(running.dtype), decay), running)
        for running, batch in (
            (mean.astype(dtype) - shift, measured.delta),
            (var.astype(reduction_dtype(dtype)), measured.var),
        )
    )
    return shift, var, delta


def _update(
    config: NormConfig,
    inputs: Inputs,
    batch_stats: BatchStats,
    options: Options,
    measured: ShiftedMoments,
    moments: Moments,
) -> Any:
    """The running statistics after the batch, of the channels that have a variance in it."""
    # If several rows are known to be there, every channel has a variance, and no mask is needed.
    rows = static_count(inputs.x, inputs.weights, config.reduction.axes)
    has_several = rows is not None and rows * config.reduction.size > 1
    return update_running(
        batch_stats,
        moments,
        options.momentum,
        None if has_several else lax.squeeze(measured.num_valid > 1, config.reduction.axes),
        unbiased=options.unbiased,
        skip_nonfinite=options.skip_nonfinite,
    )


def _eval_stats(config: NormConfig, x: X, batch_stats: BatchStats, options: Options) -> tuple[Array, Array]:
    """The mean and the variance of evaluation, with x's rank."""
    stats = debiased(batch_stats, options.momentum) if options.debias else batch_stats
    return _expanded(stats["mean"], config, x), _expanded(stats["var"], config, x)


def _expanded(statistic: Array, config: NormConfig, x: X) -> Array:
    """A running statistic with x's rank."""
    return sharded_like(jnp.expand_dims(statistic, config.reduction.axes), x)
