"""Batch normalization for JAX that is right however the batch is cut.

This module has pure functions over parameters and running statistics. The Flax layers are in `jbn.linen`
and `jbn.nnx`, and tools for whole models in `jbn.tools`: each is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jbn._core.batch_norm import batch_norm as batch_norm
from jbn._core.batch_norm import init as init
from jbn._core.checkpoint import checkpoint_policy as checkpoint_policy
from jbn._core.moments import Moments as Moments
from jbn._core.moments import merge as merge
from jbn._core.moments import moments as moments
from jbn._core.renorm import Renorm as Renorm
from jbn._core.running import update as update

__version__ = "0.1.0"
__all__ = ["Moments", "Renorm", "batch_norm", "checkpoint_policy", "init", "merge", "moments", "update"]

_DOORS = ("linen", "nnx", "tools")

if not TYPE_CHECKING:  # or every name would seem to exist

    def __getattr__(name: str) -> Any:
        if name in _DOORS:
            return importlib.import_module(f"jbn.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_DOORS})
