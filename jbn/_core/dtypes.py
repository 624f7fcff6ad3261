"""The one dtype policy of the package."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jbn._core.types import BatchStats, Dtype, X


def reduction_dtype(*dtypes: Dtype) -> np.dtype:
    """The real dtype in which statistics of arrays of these dtypes are reduced.

    float32, or float64 as soon as one of them carries float64 or complex128: a sum of squares in bfloat16
    or float16 is off by tens of percent, or overflows. Eight-bit floats, integers and booleans, for which
    JAX's promotion has no or a surprising answer, get float32 as well.
    """
    double = any(jnp.finfo(d).bits == 64 for d in dtypes if jnp.issubdtype(d, jnp.inexact))
    return np.dtype(np.float64 if double else np.float32)


def compute_dtype(*dtypes: Dtype) -> np.dtype:
    """The dtype in which arrays of these dtypes are combined: as for reductions, and complex if one is."""
    is_complex = any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes)
    return np.result_type(reduction_dtype(*dtypes), np.complex64 if is_complex else np.float32)


def promote_stats(batch_stats: BatchStats, x: X) -> dict[str, Array]:
    """Running statistics in float32 or wider, as the layers keep them; the mean is complex where x is.

    A checkpoint may hold bfloat16, in which averages stall; Flax starts the mean of complex x as a real 0.
    """
    mean = jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32
    least = {"mean": mean, "var": jnp.float32, "rows": jnp.float32}
    return {
        name: value.astype(compute_dtype(value.dtype, least[name])) if name in least else value
        for name, value in batch_stats.items()
    }


def output_dtype(x: X, dtype: Dtype | None) -> np.dtype:
    """The dtype of y: the one asked for, else that of x, and float32 for integer x."""
    if dtype is not None:
        return jnp.dtype(dtype)
    return x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else np.dtype(np.float32)


def as_numeric(value: Any) -> Array | None:
    """The value as an array, or None if it is none of numbers."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        return None
    return array if jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool else None


def unwrapped(tree: Any) -> Any:
    """The tree with the arrays that variables of NNX hold, which JAX does not take apart by itself."""
    try:
        leaves, structure = jax.tree.flatten(tree, is_leaf=_is_variable)
    except ValueError:  # keys that cannot be sorted, in a mapping that is refused later
        return tree
    if not any(map(_is_variable, leaves)):
        return tree
    arrays = [as_numeric(leaf) if _is_variable(leaf) else None for leaf in leaves]
    both = zip(arrays, leaves, strict=True)
    return jax.tree.unflatten(structure, [leaf if array is None else array for array, leaf in both])


def _is_variable(value: Any) -> bool:
    return hasattr(value, "__jax_array__") and not isinstance(value, jax.Array)
