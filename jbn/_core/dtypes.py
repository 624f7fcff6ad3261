"""Array aliases, axis types, the one dtype policy of the package, and what shows of shardings."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Num

Axes: TypeAlias = int | Sequence[int]
"""A feature axis, or several; negative ones count from the end."""

AxisName: TypeAlias = Hashable | tuple[Hashable, ...]
"""A name bound by `vmap`, `pmap` or `shard_map`, or several of them."""

AxisIndexGroups: TypeAlias = Sequence[Sequence[int]]
"""Which devices of the named axis normalize together."""

Dtype: TypeAlias = Any
"""Whatever `jnp.dtype` takes."""

Params: TypeAlias = Mapping[str, Array]
BatchStats: TypeAlias = Mapping[str, Array]

X: TypeAlias = Num[Array, "..."]
Flag: TypeAlias = bool | Bool[Array, ""]


def wide(*dtypes: Dtype) -> np.dtype:
    """The real dtype in which statistics of arrays of these dtypes are reduced.

    float32, or float64 as soon as one of them carries float64 or complex128: a sum of squares in bfloat16
    or float16 is off by tens of percent, or overflows. Eight-bit floats, integers and booleans, for which
    JAX's promotion has no or a surprising answer, get float32 as well.
    """
    double = any(jnp.finfo(d).bits == 64 for d in dtypes if jnp.issubdtype(d, jnp.inexact))
    return np.dtype(np.float64 if double else np.float32)


def working(*dtypes: Dtype) -> np.dtype:
    """The dtype in which arrays of these dtypes are combined: `wide`, and complex if one of them is."""
    is_complex = any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes)
    return np.result_type(wide(*dtypes), np.complex64 if is_complex else np.float32)


def kept(batch_stats: BatchStats, x: X) -> dict[str, Array]:
    """Running statistics as the layers keep them: in float32 or wider, the mean complex where x is.

    A checkpoint may hold bfloat16, in which averages stall; Flax starts the mean of complex x as a real 0.
    """
    mean = jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32
    kinds = {"mean": mean, "var": jnp.float32, "rows": jnp.float32}
    return {
        name: value.astype(working(value.dtype, kinds[name])) if name in kinds else value
        for name, value in batch_stats.items()
    }


def output(x: X, dtype: Dtype | None) -> np.dtype:
    """The dtype of y: the one asked for, else that of x, and float32 for integer x."""
    if dtype is not None:
        return jnp.dtype(dtype)
    return x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else np.dtype(np.float32)


def spec(x: X) -> tuple[Any, ...]:
    """Per axis of x, the explicit mesh axes it is sharded over, or None: all that shows while tracing."""
    known = tuple(jax.typeof(x).sharding.spec)
    return known + (None,) * (x.ndim - len(known))


def across(x: X, axis: int) -> int:
    """How many devices an axis of x is cut over by explicit mesh axes."""
    names = spec(x)[axis]
    names = names if isinstance(names, tuple) else () if names is None else (names,)
    return math.prod(jax.typeof(x).sharding.mesh.shape[name] for name in names)


def sharded_like(value: Array, x: X) -> Array:
    """The value, of x's rank and 1 or x's size along each axis, sharded as x is.

    Under explicit mesh axes JAX refuses to combine differently sharded arrays; elsewhere this does nothing.
    """
    wanted = tuple(None if size == 1 else axes for size, axes in zip(value.shape, spec(x), strict=True))
    if spec(value) == wanted:
        return value
    # Either may be on a mesh where none is set.
    meshes = (jax.typeof(array).sharding.mesh for array in (x, value))
    mesh = next(mesh for mesh in meshes if not mesh.empty)
    sharded: Array = jax.sharding.reshard(
        value, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*wanted))
    )
    return sharded


def describe(value: Any) -> str:
    """How error texts show an argument: `float32[8,3]` for an array, its repr for anything else."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return repr(value)
