"""Validation of the options of `batch_norm`, alone and of those that do not go together."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import ones, zeros
from jaxtyping import Array

from jbn._core.arguments import as_numbers, check_batch_stats, check_epsilon, check_values, fits
from jbn._core.dtypes import Axes, AxisIndexGroups, AxisName, BatchStats, X, across, describe, sharded_like
from jbn._core.errors import error
from jbn._core.renorm import Renorm, check_renorm
from jbn._core.scalars import check_momentum, check_static, is_share


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be chosen about a batch norm, by the names of the arguments of `jbn.batch_norm`."""

    axis: Axes
    epsilon: float
    # how statistics are measured
    axis_name: AxisName | None
    axis_index_groups: AxisIndexGroups | None
    virtual_batch_size: int | None
    renorm: Renorm | None
    # how they are remembered
    momentum: float | Array | None
    unbiased: bool
    debias: bool
    skip_nonfinite: bool
    # how they are used
    blend: float | Array | None
    # what happens after
    activation: str | None

    @classmethod
    def of(cls, layer: Any) -> "Options":
        """Those of a layer, which has them as its attributes."""
        return cls(**{field.name: getattr(layer, field.name) for field in dataclasses.fields(cls)})


def counters(momentum: float | Array | None, debias: bool) -> tuple[str, ...]:
    """The entries of batch_stats, beside mean and var, that a batch norm with these options keeps."""
    return ("count", "rows") if momentum is None or debias else ()


def check_options(
    options: Options, x: X, axes: tuple[int, ...], weights: Array | None, dtype: np.dtype
) -> None:
    """Each option, and those that do not go together."""
    check_momentum(options.momentum)
    check_epsilon(options.epsilon)
    for name in ("unbiased", "debias", "skip_nonfinite"):
        check_static(name, getattr(options, name))
    if options.debias:
        _check_debias(options.momentum, weights, axes)
    size = options.virtual_batch_size
    if size is not None and (isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1):
        raise error(
            "virtual_batch_size",
            describe(size),
            "a static int from 1 up, or None",
            "Usually 32 to 256.",
        )
    check_renorm(options.renorm, x)
    if options.blend is not None and not is_share(options.blend):
        raise error(
            "blend",
            describe(options.blend),
            "a number from 0 to 1, a scalar array, or None",
            "It weighs the running statistics: 1 leaves the batch out.",
        )
    if options.activation is not None and (
        options.activation != "relu" or jnp.issubdtype(dtype, jnp.complexfloating)
    ):
        raise error(
            "activation",
            f"{options.activation if isinstance(options.activation, str) else 'no text'} for y of {dtype}",
            "None, or 'relu' for a real y",
            "Apply any other function to y.",
        )


def check_statistics(
    options: Options, batch_stats: BatchStats | None, x: X, axes: tuple[int, ...], training: bool
) -> None:
    """Running statistics that fit x, with what the options need."""
    if batch_stats is None:
        for name, use in (("renorm", "to correct towards"), ("blend", "to blend with")):
            if getattr(options, name) is not None:
                raise error(
                    name,
                    "given, and batch_stats is None",
                    f"running statistics {use}",
                    f"Pass the batch_stats of jbn.init, or leave {name} out.",
                )
        return
    check_batch_stats(batch_stats, x, axes)
    check_counters(batch_stats, options.momentum, debias=options.debias, training=training)


def check_groups(options: Options, x: X, axes: tuple[int, ...]) -> None:
    """Groups that divide the batch."""
    size = options.virtual_batch_size
    if size is None:
        return
    examples = x.shape[axes[0]] if axes else 0
    if not axes or examples % size:
        raise error(
            "virtual_batch_size",
            f"{size} for x = {describe(x)}",
            f"a divisor of the {examples} examples",
            "Drop the last batch of an epoch, or pad it to the full size and pass mask.",
        )
    groups, devices = examples // size, across(x, axes[0])
    if devices > 1 and groups > 1 and groups % devices:
        raise error(
            "virtual_batch_size",
            f"{size}, {groups} groups on {devices} devices",
            "groups that lie on one device each",
            f"Use {examples // devices} or a divisor of it: the mesh axes of x are explicit.",
        )


def check_several(options: Options, x: X, axes: tuple[int, ...], weights: Array | None) -> None:
    """More than one value per channel, in the batch or in each group, as far as that is known while tracing.

    Batch renormalization has a meaning for one value: x_hat is 0, and y = scale * d + bias.
    """
    if weights is not None or options.renorm is not None:
        return
    if options.virtual_batch_size is None and options.axis_name is None:
        check_values(x, axes)
    if options.virtual_batch_size == 1 and all(x.shape[axis] == 1 for axis in axes[1:]):
        raise error(
            "virtual_batch_size",
            f"1 for x = {describe(x)}, one value per channel",
            "groups of at least two values per channel in training",
            "A single value has no variance and would turn into bias: use larger groups.",
        )


def check_counters(
    batch_stats: BatchStats, momentum: float | Array | None, *, debias: bool, training: bool
) -> None:
    """The entries that momentum=None and debias count with."""
    needed = {"rows": training and momentum is None, "count": debias and momentum is not None}
    for name, is_needed in needed.items():
        if is_needed and name not in batch_stats:
            reason = "momentum=None" if momentum is None else "debias=True"
            raise error(
                "batch_stats",
                f"a mapping with {', '.join(batch_stats)}",
                f"{name} for {reason}",
                "Begin with it: layers make it in init, and jbn.init(features, count=True) does.",
            )


def check_start(debias: bool, mean_init: Any, var_init: Any) -> None:
    """With debias, the initial statistics 0 and 1: they are what is divided out."""
    # unwrapped, since nn.with_partitioning gives an initializer names of axes and the same values
    mean_init, var_init = (None if init is None else inspect.unwrap(init) for init in (mean_init, var_init))
    if debias and (mean_init not in (None, zeros) or var_init not in (None, ones)):
        raise error(
            "debias",
            "True with a mean_init or var_init of your own",
            "initial statistics 0 and 1, which debiased evaluation divides out",
            "Leave one of them out.",
        )


def _check_debias(momentum: float | Array | None, weights: Array | None, axes: tuple[int, ...]) -> None:
    """One momentum, and updates of all channels alike: else their count does not say what is left."""
    check_constant(momentum)
    if weights is not None and any(size != 1 for axis, size in enumerate(weights.shape) if axis not in axes):
        raise error(
            "mask",
            f"{describe(weights)} with debias=True",
            "one for all channels",
            "count is one number for all of them: use momentum=None, which counts by channel.",
        )


def check_constant(momentum: float | Array | None) -> None:
    """A momentum for debiasing."""
    if isinstance(momentum, (jax.Array, np.ndarray)):
        raise error(
            "momentum",
            f"{describe(momentum)}, to debias with",
            "a number, or None",
            "What is left of the initial statistics is known for a momentum that stays the same.",
        )


def check_residual(residual: Any, x: X, dtype: np.dtype) -> Array | None:
    """What is added to y: an array that broadcasts to x."""
    if residual is None:
        return None
    value = as_numbers(residual)
    if (
        value is None
        or value.ndim != x.ndim
        or not fits(value.shape, x.shape)
        or (jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating))
    ):
        raise error(
            "residual",
            f"{describe(residual)} for x = {describe(x)}",
            "an array of as many axes, each 1 or x's size, and complex only if y is",
            "It is added to y: project it to y's shape first.",
        )
    return sharded_like(value, x)
