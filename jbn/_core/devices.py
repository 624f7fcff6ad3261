"""What statistics are taken over: axes of an array, and devices. The collectives are here, and only here."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jbn._core.errors import error
from jbn._core.types import AxisName


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What statistics are taken over: axes of x, and devices. Static and hashable."""

    axes: tuple[int, ...]
    axis_name: AxisName | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    size: int = 1  # devices of one batch; fixed at the start, for a reason given at pmean

    def psum(self, value: Array) -> Array:
        """The sum over the devices of one batch."""
        return self._collective(lambda name, **groups: lax.psum(value, name, **groups))

    def pmean(self, value: Array) -> Array:
        """The mean over the devices of one batch: `lax.pmean`, as the psum and division that it stands for.

        JAX runs the derivative rule of a staged `vmap(..., axis_name=...)` (inside jit, scan, checkpoint)
        when the name is no longer bound. A psum still works there, asking for the size of the axis does not.
        """
        return value if self.axis_name is None else self.psum(value) / self.size

    def pmax(self, value: Array) -> Array:
        """The maximum over the devices of one batch."""
        return self._collective(lambda name, **groups: lax.pmax(value, name, **groups))

    def index(self) -> Array:
        """This device's place among the devices of its batch."""
        index = lax.axis_index(self.axis_name)
        if self.groups is None:
            return index
        places = {device: place for group in self.groups for place, device in enumerate(group)}
        return jnp.asarray([places[device] for device in sorted(places)], np.int32)[index]

    def has_index(self) -> bool:
        """Whether `index` compiles: always, from JAX 0.10.2 on.

        Before, `lax.axis_index` in a shard_map within a shard_map is an error, or hangs while JAX prints it.
        All that shows of nesting is that several axes of the mesh are bound, as they may be in one shard_map.
        """
        return jax.__version_info__ >= (0, 10, 2) or len(jax.sharding.get_abstract_mesh().manual_axes) < 2

    def _collective(self, operation: Callable[..., Array]) -> Array:
        """The operation with axis name and groups; an error of JAX becomes one that says what to do."""
        groups = {} if self.groups is None else {"axis_index_groups": self.groups}
        try:
            return operation(self.axis_name, **groups)
        except NotImplementedError:
            raise error(
                "axis_index_groups",
                f"{self.groups!r} under vmap, or under shard_map with check_vma=True",
                "None there, where JAX cannot group devices",
                "Split the axis in two, for example a mesh of shape (groups, devices per group), and pass "
                "the name of the second as axis_name.",
            ) from None
