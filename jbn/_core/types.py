"""What arguments are: aliases for annotations."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

from jaxtyping import Array, Bool, Num

Axes: TypeAlias = int | Sequence[int]
"""A feature axis, or several; negative ones count from the end."""

AxisName: TypeAlias = Hashable | tuple[Hashable, ...]
"""A name bound by `vmap`, `pmap` or `shard_map`, or several of them."""

AxisIndexGroups: TypeAlias = Sequence[Sequence[int]]
"""Which devices of the named axis normalize together."""

ActivationLike: TypeAlias = str | Callable[[Array], Array]
"""An elementwise function, or "relu"."""

Dtype: TypeAlias = Any
"""Whatever `jnp.dtype` takes."""

Params: TypeAlias = Mapping[str, Array]
BatchStats: TypeAlias = Mapping[str, Array]

X: TypeAlias = Num[Array, "..."]
Flag: TypeAlias = bool | Bool[Array, ""]
