"""Static validation: what is wrong with a call is said while it is traced."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jbn._core.dtypes import Axes, Dtype, X, describe, output, sharded_like
from jbn._core.errors import error

_NUMBERS = (int, float, np.number, np.ndarray, jax.Array)
_RIGHT_SIZE = (
    "Make them for as many features as x has (jbn.init(features), num_features), or set axis to x's "
    "feature axis."
)


_NOT_THE_SHAPE = "jbn.init takes the number of channels, usually x.shape[-1], and not x.shape."


def check_x(x: Any, axis: Axes) -> tuple[X, tuple[int, ...]]:
    """x as an array of numbers, and the axes to reduce: all that are not feature axes."""
    given, x = x, as_numbers(x)
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
            f"a mapping with {', '.join(unknown)}",
            f"only {', '.join(allowed)}",
            "Is it swapped with the other? params come first, then batch_stats." if swapped else layer,
        )
    for name, value in given.items():
        if isinstance(value, (list, tuple)) or as_numbers(value) is None:
            boxed = hasattr(value, "unbox")
            raise error(
                f"{argument}[{name!r}]",
                f"a {type(value).__name__}" if boxed else describe(value),
                "an array of numbers",
                "Take the arrays out of their boxes: flax.linen.unbox(variables)."
                if boxed
                else "Leave out what the layer does not have; convert lists with jnp.asarray.",
            )


def unwrapped(entries: Any) -> Any:
    """The entries with the arrays that variables of NNX hold, which JAX does not take apart by itself."""
    if not isinstance(entries, Mapping) or not any(_is_variable(value) for value in entries.values()):
        return entries
    arrays = {name: as_numbers(value) for name, value in entries.items() if _is_variable(value)}
    return {name: value if arrays.get(name) is None else arrays[name] for name, value in entries.items()}


def _is_variable(value: Any) -> bool:
    return hasattr(value, "__jax_array__") and not isinstance(value, jax.Array)


def check_param(argument: str, value: Array, x: X, axes: tuple[int, ...]) -> None:
    """A scale or bias: one value per channel, or of x's rank and broadcastable to x."""
    shape, features = np.shape(value), feature_shape(x, axes)
    if shape != features and not (len(shape) == x.ndim and fits(shape, x.shape)):
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


def check_epsilon(epsilon: Any) -> None:
    """What is added to the variance: static, so that 0 can be told from the rest."""
    static = (
        not isinstance(epsilon, jax.core.Tracer) and isinstance(epsilon, _NUMBERS) and np.ndim(epsilon) == 0
    )
    if not static or not 0.0 <= float(epsilon) < float("inf"):
        raise error("epsilon", describe(epsilon), "a static number from 0 up", "The usual one is 1e-5.")


def check_dtype(dtype: Dtype | None, inputs: Sequence[Any]) -> np.dtype:
    """The dtype of y: one that can hold what is computed from the inputs x, scale, bias."""
    is_complex = any(jnp.iscomplexobj(value) for value in inputs if value is not None)
    kind = "complex" if is_complex else "floating"
    try:
        found = output(inputs[0], dtype)
        good = jnp.issubdtype(found, jnp.complexfloating if is_complex else jnp.inexact)
    except TypeError:
        good = False
    if not good:
        raise error("dtype", repr(dtype), f"a {kind} dtype", "Convert y afterwards if that is meant.")
    return found


def check_mask(mask: Any, x: X, axes: tuple[int, ...]) -> Array:
    """The mask with x's rank; one of fewer axes belongs to the leading ones of `axes`, the reduced ones."""
    given, mask = mask, as_numbers(mask)
    if mask is None or jnp.iscomplexobj(mask):
        raise error("mask", describe(given), "an array of bool or float", "Compare it: mask > 0.")
    if isinstance(given, np.ndarray) and np.any(given < 0):  # what a device holds is not asked for
        raise error(
            "mask",
            f"{describe(mask)} with weights below 0",
            "weights from 0 up",
            "0 marks what takes no part.",
        )
    if mask.ndim == x.ndim and fits(mask.shape, x.shape):
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


def check_values(x: X, axes: tuple[int, ...]) -> None:
    """More than one value per channel, where that is known before anything runs."""
    if all(x.shape[axis] == 1 for axis in axes):
        raise error(
            "x",
            f"{describe(x)}, one value per channel",
            "a batch of at least two values per channel in training",
            "A single value has no variance and would turn into bias: use a larger batch, "
            "use_running_average=True, or axis_name to normalize over several devices.",
        )


def as_numbers(value: Any) -> Array | None:
    """The value as an array, or None if it is none of numbers."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        return None
    return array if jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool else None


def feature_shape(x: X, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the axes that are not reduced: [C]."""
    return tuple(size for axis, size in enumerate(x.shape) if axis not in axes)


def fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether each axis is 1 or the target's: a broadcast that adds nothing to the target."""
    return all(size in (1, wanted) for size, wanted in zip(shape, target, strict=True))
