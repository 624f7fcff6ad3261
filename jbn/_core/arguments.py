"""Arguments as the mathematics takes them: each is checked and brought into shape here, once."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jbn._core.affine import Inputs, NormConfig
from jbn._core.devices import Reduction
from jbn._core.dtypes import as_numeric, output_dtype, unwrapped
from jbn._core.errors import UnboundAxisError, describe, error, join_names
from jbn._core.options import Options, check_options, prepare_activation, prepare_axis_name
from jbn._core.sharding import num_shards, sharded_like
from jbn._core.types import Axes, AxisName, BatchStats, Dtype, Params, X

Stats = TypeVar("Stats", bound=BatchStats | None)

_RIGHT_SIZE = (
    "Make them for as many features as x has (jbn.init(features), num_features), or set axis to x's "
    "feature axis."
)
_NOT_THE_SHAPE = "jbn.init takes the number of channels, usually x.shape[-1], and not x.shape."


class Prepared(NamedTuple):
    """What the mathematics works with: running statistics are as they came, but for variables of NNX."""

    config: NormConfig
    inputs: Inputs
    batch_stats: Any
    options: Options


def prepare(
    x: X,
    axes: tuple[int, ...],
    params: Params | None,
    batch_stats: BatchStats | None,
    options: Options,
    *,
    mask: Any,
    residual: Any,
    dtype: Dtype | None,
    initializing: bool,
    in_layer: bool,
    training: bool,
    measures: bool,
) -> Prepared:
    """All arguments but x and the mode, which `prepare_x` and `prepare_flag` have prepared.

    While a layer is `initializing` there are no other devices, and groups need not divide the batch. In a
    layer a single example is a group too, as people look at models by one.
    An axis name has to be bound only where the batch is measured.
    """
    params, batch_stats, options = unwrapped(params), unwrapped(batch_stats), options.unwrapped()
    weights = None if mask is None else prepare_mask(mask, x, axes)
    scale, bias = _prepare_params(params, x, axes)
    dtype = prepare_dtype(dtype, (x, scale, bias))
    inputs = Inputs(x, weights, scale, bias, prepare_residual(residual, x, dtype))
    check_options(options, x, axes, weights, dtype)
    check_statistics(options, batch_stats, x, axes, training=training)
    if initializing:
        options = dataclasses.replace(
            options, axis_name=None, axis_index_groups=None, virtual_batch_size=None
        )
    elif training:
        if in_layer and options.axis_name is None and axes and x.shape[axes[0]] == 1:
            options = dataclasses.replace(options, virtual_batch_size=None)
        check_groups(options, x, axes)
    axis_name, groups = prepare_axis_name(options.axis_name, options.axis_index_groups)
    reduction = Reduction(axes, axis_name, groups, axis_size(axis_name, groups) if measures else 1)
    config = NormConfig(
        reduction, float(options.epsilon), dtype, prepare_activation(options.activation, dtype)
    )
    return Prepared(config, inputs, batch_stats, options)


def prepare_x(x: Any, axis: Axes) -> tuple[X, tuple[int, ...]]:
    """x as an array of numbers, and the axes to reduce: all that are not feature axes."""
    given, x = x, as_numeric(x)
    if x is None or x.ndim == 0:
        raise error("x", describe(given), "an array of numbers with at least one axis", "Convert it first.")
    named = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    try:
        features = {operator.index(a) % x.ndim for a in named if -x.ndim <= operator.index(a) < x.ndim}
    except TypeError:
        features = set()
    if not named or len(features) != len(named):
        raise error(
            "axis",
            repr(axis),
            f"one or several different axes of x = {describe(x)}",
            "Name the feature axes: -1 for NHWC, 1 for NCHW.",
        )
    return x, tuple(a for a in range(x.ndim) if a not in features)


def prepare_flag(flag: Any) -> bool | Array:
    """use_running_average as a bool, or as a scalar array if it is traced."""
    flag = unwrapped(flag)
    if isinstance(flag, (bool, np.bool_)):
        return bool(flag)
    if describe(flag) != "bool[]":
        raise error(
            "use_running_average",
            describe(flag),
            "True (evaluation) or False (training)",
            "Pass a bool, or a bool array of shape ().",
        )
    return flag if isinstance(flag, jax.core.Tracer) else bool(flag)


def check_entries(argument: str, given: Any, allowed: Sequence[str]) -> None:
    """A mapping of one layer's arrays, not of a whole model, and one that JAX can look into."""
    if not isinstance(given, Mapping) or jax.tree_util.all_leaves([given]):
        raise error(
            argument,
            describe(given),
            f"a dict or FrozenDict with {', '.join(allowed)}",
            "See jbn.init.",
        )
    if unknown := sorted(str(key) for key in given if key not in allowed):
        swapped = set(unknown) <= {"scale", "bias", "mean", "var", "count", "rows"}
        layer = f"Pass the collection of one layer, for example variables['{argument}']['BatchNorm_0']."
        raise error(
            argument,
            f"a mapping with {join_names(unknown)}",
            f"only {', '.join(allowed)}",
            "Is it swapped with the other? params come first, then batch_stats." if swapped else layer,
        )
    for name, value in given.items():
        if isinstance(value, (list, tuple)) or as_numeric(value) is None:
            boxed = hasattr(value, "unbox")
            raise error(
                f"{argument}[{name!r}]",
                f"a {type(value).__name__}" if boxed else describe(value),
                "an array of numbers",
                "Take the arrays out of their boxes: flax.linen.unbox(variables)."
                if boxed
                else "Leave out what the layer does not have; convert lists with jnp.asarray.",
            )


def _prepare_params(params: Params | None, x: X, axes: tuple[int, ...]) -> tuple[Array | None, Array | None]:
    """Scale and bias with x's rank, None where there is none."""
    params = {} if params is None else params
    check_entries("params", params, ("scale", "bias"))
    for name, value in params.items():
        check_param(f"params[{name!r}]", value, x, axes)
    full = {name: v if np.ndim(v) == x.ndim else jnp.expand_dims(v, axes) for name, v in params.items()}
    scale, bias = (sharded_like(full[name], x) if name in full else None for name in ("scale", "bias"))
    return scale, bias


def check_param(argument: str, value: Array, x: X, axes: tuple[int, ...]) -> None:
    """A scale or bias: one value per channel, or of x's rank and broadcastable to x."""
    shape, features = np.shape(value), feature_shape(x, axes)
    if shape != features and not (len(shape) == x.ndim and broadcasts_to(shape, x.shape)):
        raise error(
            argument,
            describe(value),
            f"shape {features}, or one of {x.ndim} axes that broadcasts to x = {describe(x)}",
            _RIGHT_SIZE,
        )


def check_param_dtype(dtype: Dtype) -> None:
    """A dtype that can hold a scale."""
    try:
        good = jnp.issubdtype(dtype, jnp.inexact)
    except TypeError:
        good = False
    if not good:
        raise error("param_dtype", repr(dtype), "a floating or complex dtype", "Usually jnp.float32.")


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


def check_batch_stats(stats: Any, x: X, axes: tuple[int, ...]) -> None:
    """mean and var, one value per channel, perhaps with count and rows; a complex mean for complex x."""
    check_entries("batch_stats", stats, ("mean", "var", "count", "rows"))
    if not {"mean", "var"} <= set(stats):
        raise error("batch_stats", f"a mapping with {', '.join(stats)}", "mean and var", "See jbn.init.")
    for name, value in stats.items():
        shape = () if name == "count" else feature_shape(x, axes)
        if np.shape(value) != shape:
            fix = _NOT_THE_SHAPE if np.shape(value) == x.shape else _RIGHT_SIZE
            raise error(f"batch_stats[{name!r}]", describe(value), f"shape {shape}", fix)
        kind = "integer" if name == "count" else "inexact"
        if not jnp.issubdtype(jnp.asarray(value).dtype, getattr(jnp, kind)):
            raise error(
                f"batch_stats[{name!r}]",
                describe(value),
                "an integer dtype" if name == "count" else "a floating dtype",
                "Averages are kept in float32, the number of updates in int32.",
            )
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(stats["mean"]):
        raise error(
            "batch_stats['mean']",
            describe(stats["mean"]),
            f"a complex dtype for x = {describe(x)}",
            "Cast it: mean.astype(jnp.complex64).",
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


def prepare_dtype(dtype: Dtype | None, inputs: Sequence[Any]) -> np.dtype:
    """The dtype of y: one that can hold what is computed from the inputs x, scale, bias."""
    is_complex = any(jnp.iscomplexobj(value) for value in inputs if value is not None)
    kind = "complex" if is_complex else "floating"
    try:
        found = output_dtype(inputs[0], dtype)
        good = jnp.issubdtype(found, jnp.complexfloating if is_complex else jnp.inexact)
    except TypeError:
        good = False
    if not good:
        raise error("dtype", repr(dtype), f"a {kind} dtype", "Convert y afterwards if that is meant.")
    return found


def prepare_mask(mask: Any, x: X, axes: tuple[int, ...]) -> Array:
    """The mask with x's rank; one of fewer axes belongs to the leading ones of `axes`, the reduced ones."""
    given, mask = mask, as_numeric(mask)
    if mask is None or jnp.iscomplexobj(mask):
        raise error("mask", describe(given), "an array of bool or float", "Compare it: mask > 0.")
    if isinstance(given, np.ndarray) and np.any(given < 0):  # what a device holds is not asked for
        raise error(
            "mask",
            f"{describe(mask)} with weights below 0",
            "weights from 0 up",
            "0 marks what takes no part.",
        )
    if mask.ndim == x.ndim and broadcasts_to(mask.shape, x.shape):
        return sharded_like(mask, x)
    leading, reduced = axes[: mask.ndim], tuple(x.shape[a] for a in axes)
    if mask.ndim < x.ndim and mask.shape == reduced[: mask.ndim]:
        return sharded_like(jnp.expand_dims(mask, tuple(a for a in range(x.ndim) if a not in leading)), x)
    raise error(
        "mask",
        f"{describe(mask)} for x = {describe(x)}",
        f"as many axes, each 1 or x's size, or shape {reduced} or a leading part of it",
        "True marks what takes part: mask = jnp.arange(x.shape[0]) < number_of_examples.",
    )


def prepare_residual(residual: Any, x: X, dtype: np.dtype) -> Array | None:
    """What is added to y: an array that broadcasts to x."""
    if residual is None:
        return None
    value = as_numeric(residual)
    if (
        value is None
        or value.ndim != x.ndim
        or not broadcasts_to(value.shape, x.shape)
        or (jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating))
    ):
        raise error(
            "residual",
            f"{describe(residual)} for x = {describe(x)}",
            "an array of as many axes, each 1 or x's size, and complex only if y is",
            "It is added to y: project it to y's shape first.",
        )
    return sharded_like(value, x)


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
    groups, devices = examples // size, num_shards(x, axes[0])
    if devices > 1 and groups > 1 and groups % devices:
        raise error(
            "virtual_batch_size",
            f"{size}, {groups} groups on {devices} devices",
            "groups that lie on one device each",
            f"Use {examples // devices} or a divisor of it: the mesh axes of x are explicit.",
        )


def check_batch_size(options: Options, inputs: Inputs, axes: tuple[int, ...]) -> None:
    """More than one value per channel, in the batch or in each group, as far as that is known while tracing.

    Batch renormalization has a meaning for one value: x_hat is 0, and y = scale * d + bias.
    """
    x = inputs.x
    if inputs.weights is not None or options.renorm is not None:
        return
    if options.virtual_batch_size is None and options.axis_name is None:
        if all(x.shape[axis] == 1 for axis in axes):
            raise error(
                "x",
                f"{describe(x)}, one value per channel",
                "a batch of at least two values per channel in training",
                "A single value has no variance and would turn into bias: use a larger batch, "
                "use_running_average=True, or axis_name to normalize over several devices.",
            )
    elif options.virtual_batch_size == 1 and all(x.shape[axis] == 1 for axis in axes[1:]):
        raise error(
            "virtual_batch_size",
            f"1 for x = {describe(x)}, one value per channel",
            "groups of at least two values per channel in training",
            "A single value has no variance and would turn into bias: use larger groups.",
        )


def axis_size(axis_name: AxisName | None, groups: tuple[tuple[int, ...], ...] | None) -> int:
    """How many devices share a batch, where the axis is bound."""
    if axis_name is None:
        return 1
    try:
        size = int(lax.psum(1, axis_name))
    except NameError:
        raise error(
            "axis_name",
            f"{axis_name!r}, which nothing around the call binds",
            "a name bound by shard_map, pmap or vmap",
            "Run the training step inside one of them with this axis name, or leave axis_name out: "
            "under jit, sharded arrays are synchronised without it.",
            UnboundAxisError,
        ) from None
    if groups is None:
        return size
    if sorted(index for group in groups for index in group) != list(range(size)):
        raise error(
            "axis_index_groups",
            f"{groups!r} for the {size} devices of {axis_name!r}",
            "each index in one group",
            "For example axis_name='data', axis_index_groups=[[0, 1], [2, 3]].",
        )
    return len(groups[0])


def feature_shape(x: X, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the axes that are not reduced: [C]."""
    return tuple(size for axis, size in enumerate(x.shape) if axis not in axes)


def broadcasts_to(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether each axis is 1 or the target's: a broadcast that adds nothing to the target."""
    return all(size in (1, wanted) for size, wanted in zip(shape, target, strict=True))
