"""One layer's arrays, from and to another library's: read, written and checked here for all of them.

No other library is imported: tensors are read through NumPy. Nothing is dropped or made up in silence: what
is missing, or has no counterpart, is an error that names it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax import lax
from jaxtyping import Array

from jbn._core.dtypes import reduction_dtype
from jbn._core.errors import describe, error
from jbn._core.options import is_number
from jbn._core.types import BatchStats, Params
from jbn.tools._convert.libraries import Library, brief, check_names, check_together


def read(library: Library, given: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Ours from theirs."""
    names = library.names
    required = [names[name] for name in ("mean", "var")]
    check_names("state", given, required, names.values(), library.reading)
    labels = {name: label_of(theirs) for name, theirs in names.items() if theirs in given}
    arrays = {name: to_numpy(label, given[names[name]]) for name, label in labels.items()}
    _check_arrays(labels, arrays, library.reading)
    if "count" in arrays:
        arrays["count"] = arrays["count"].astype(np.int32)
    new = {name: to_jax(labels[name], array) for name, array in arrays.items()}
    params = {name: new.pop(name) for name in ["scale", "bias"] if name in new}
    return params, new


def write(library: Library, params: Params | None, batch_stats: BatchStats) -> dict[str, np.ndarray]:
    """Theirs from ours, but for `rows`, which none of them keeps."""
    batch_stats = (
        {name: value for name, value in batch_stats.items() if name != "rows"}
        if isinstance(batch_stats, Mapping)
        else batch_stats
    )
    params, names = {} if params is None else params, library.names
    statistics = [name for name in ("mean", "var", "count") if name in names]
    required = statistics if library.counted else ["mean", "var"]
    check_names("params", params, (), ("scale", "bias"), library.writing)
    check_names("batch_stats", batch_stats, required, statistics, library.writing)
    check_together("params", params, library.together)
    given = {**params, **batch_stats}
    labels = {n: f"{'params' if n in params else 'batch_stats'}[{n!r}]" for n in names if n in given}
    arrays = {name: to_numpy(label, given[name]) for name, label in labels.items()}
    _check_arrays(labels, arrays, library.writing)
    return {names[name]: array for name, array in arrays.items()}


def _check_arrays(labels: Mapping[str, str], arrays: Mapping[str, np.ndarray], fix: str) -> None:
    """One float per channel in each, as many as in mean; a count is one integer that int32 can hold."""
    shape = (arrays["mean"].size,)
    for name, array in arrays.items():
        if name == "count":
            good = array.shape == () and jnp.issubdtype(array.dtype, jnp.integer)
            good = good and 0 <= int(array) < 2**31
            expected = "one integer from 0 to 2147483647"
        else:
            good = array.shape == shape and jnp.issubdtype(array.dtype, jnp.inexact)
            expected = f"floats of shape {shape}, one per channel"
        if not good:
            got = describe(array) if array.ndim else f"{describe(array)} of value {array}"
            raise error(labels[name], got, expected, fix)


def to_numpy(label: str, value: Any) -> np.ndarray:
    """A copy as a NumPy array, out of its box if any: whoever trains a tensor in place does not change it."""
    value = meta.unbox(value)
    try:
        return _copied(value.detach().cpu() if callable(getattr(value, "detach", None)) else value)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
        fix = "Call it outside of jit, and not on tensors without data."
        raise error(label, brief(value), "an array that can be read", fix) from None


def _copied(value: Any) -> np.ndarray:
    try:
        return np.asarray(value).copy()
    except TypeError:  # a dtype of PyTorch that NumPy lacks: bfloat16
        return np.asarray(jax.dlpack.from_dlpack(value.contiguous())).copy()


def to_jax(label: str, array: np.ndarray) -> Array:
    """The array as a JAX array, unless JAX would round it."""
    new = jnp.asarray(array)
    if new.dtype != array.dtype:
        fix = "Cast it to float32, or enable jax_enable_x64."
        raise error(label, describe(array), "a dtype that JAX keeps", fix)
    return new


def label_of(theirs: str) -> str:
    """How errors show an entry of a table."""
    part, _, name = theirs.rpartition("/")
    return f"{part or 'state'}[{name!r}]"


def debias_factor(argument: str, momentum: Any, count: Array, value: Array) -> Array:
    """1 - momentum**count, of the dtype in which the value is scaled: what an average from 0 adds up to."""
    if not is_number(momentum) or not 0 <= momentum < 1:
        fix = "Pass that of the layer."
        raise error(argument, describe(momentum), "a number from 0 up and below 1", fix)
    return 1 - lax.pow(jnp.asarray(momentum, reduction_dtype(value.dtype)), count)
