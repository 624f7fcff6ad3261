"""Arrays that a mesh with explicit axes cuts into shards: all that shows of it while tracing."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from jbn._core.types import X


def partition_spec(x: X) -> tuple[Any, ...]:
    """Per axis of x, the explicit mesh axes over which it is sharded, or None."""
    known = tuple(jax.typeof(x).sharding.spec)
    return known + (None,) * (x.ndim - len(known))


def num_shards(x: X, axis: int) -> int:
    """How many shards explicit mesh axes make of an axis of x."""
    names = partition_spec(x)[axis]
    names = names if isinstance(names, tuple) else () if names is None else (names,)
    return math.prod(jax.typeof(x).sharding.mesh.shape[name] for name in names)


def sharded_like(value: Array, x: X) -> Array:
    """The value, of x's rank and 1 or x's size along each axis, sharded as x is.

    Under explicit mesh axes JAX refuses to combine differently sharded arrays; elsewhere this does nothing.
    """
    wanted = tuple(
        None if size == 1 else axes for size, axes in zip(value.shape, partition_spec(x), strict=True)
    )
    if partition_spec(value) == wanted:
        return value
    # Either may be on a mesh where none is set.
    meshes = (jax.typeof(array).sharding.mesh for array in (x, value))
    mesh = next(mesh for mesh in meshes if not mesh.empty)
    sharded: Array = jax.sharding.reshard(
        value, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*wanted))
    )
    return sharded


def in_auto_mode(function: Callable[..., Array], x: X, spec: tuple[Any, ...]) -> Callable[..., Array]:
    """The function with explicit axes of x's mesh automatic inside, and its result sharded by `spec`.

    So XLA finds out how each step is sharded, where JAX would have to be told.
    """
    if not any(partition_spec(x)):
        return function
    mesh = jax.typeof(x).sharding.mesh
    out = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    # Those of them alone: a shard_map around may have others of the mesh, which are not to be touched.
    automatic: Callable[..., Array] = jax.sharding.auto_axes(
        function, axes=mesh.explicit_axes, out_sharding=out
    )
    return automatic
