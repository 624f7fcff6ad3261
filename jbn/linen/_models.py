"""Models of linen as they are: ours in the place of Flax's batch norms."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array

from jbn._errors import error
from jbn._types import Flag, X
from jbn.linen._layer import BatchNorm

_OVERRIDES: ContextVar[dict[str, Any]] = ContextVar("overrides", default={})  # noqa: B039 - never changed


class _StandIn(BatchNorm):
    """In the place of one of Flax's layers, which captures the intermediates of the call that it got."""

    @nn.nowrap
    def sow(self, *args: Any, **kwargs: Any) -> bool:
        return False


@contextlib.contextmanager
def replace_batch_norm(**overrides: Any) -> Iterator[None]:
    """Makes every `flax.linen.BatchNorm` that is applied inside run as `jbn.linen.BatchNorm`.

    Models that somebody else wrote get accurate, masked or synchronised batch norm with no edit. Parameters,
    statistics, modes and settings stay as they are, except for the overrides; an override of
    `use_running_average` counts for more than what the model says in its calls. Subclasses of Flax's layer,
    and all other layers, are left alone. Contexts nest, inner overrides first, and hold for one thread.

    What `jax.jit` has compiled outside is traced again inside, once for each set of overrides.

    Args:
      **overrides: fields of `jbn.linen.BatchNorm` that get these values in all layers.

    Returns:
      A context manager.

    Raises:
      ValueError: an override that is no field of the layer.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jbn.linen
      >>> model, x = nn.BatchNorm(use_running_average=False), jnp.array([[1.0], [3.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> with jbn.linen.replace_batch_norm(momentum=0.5):
      ...     y, new = model.apply(variables, x, mutable=["batch_stats"])
      >>> print(new["batch_stats"]["mean"])
      [1.]
    """
    fields = _fields(BatchNorm)
    shared = fields & _fields(nn.BatchNorm)
    if unknown := sorted(set(overrides) - fields):
        raise error(
            "linen.replace_batch_norm",
            "overrides",
            ", ".join(unknown),
            f"fields of jbn.linen.BatchNorm ({', '.join(sorted(fields))})",
            "Check the spelling.",
        )

    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        flax_layer = context.module
        if type(flax_layer) is not nn.BatchNorm or context.method_name != "__call__":
            return call(*args, **kwargs)
        settings = {name: getattr(flax_layer, name) for name in shared}
        scope: Any = flax_layer.scope  # ours has its variables where Flax's has them
        ours = _StandIn(**(settings | _OVERRIDES.get()), parent=scope)

        def run(x: X, use_running_average: Flag | None = None, **options: Any) -> Array:
            overridden = "use_running_average" in _OVERRIDES.get()
            return ours(x, None if overridden else use_running_average, **options)

        return run(*args, **kwargs)

    token = _OVERRIDES.set(_OVERRIDES.get() | overrides)
    # Metadata is part of the key by which JAX finds what it has traced, overrides must be too.
    traced_again = set_xla_metadata(jbn_replace_batch_norm=repr(sorted(_OVERRIDES.get().items())))
    try:
        with nn.intercept_methods(intercept), traced_again:
            yield
    finally:
        _OVERRIDES.reset(token)


def _fields(layer: type[nn.Module]) -> set[str]:
    """The settings of a layer, without what says where it is."""
    return {field.name for field in dataclasses.fields(layer)} - {"parent", "name"}
