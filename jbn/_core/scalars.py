"""Numbers and choices among the arguments: what each may be, and the errors that say so."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jbn._core.dtypes import describe
from jbn._core.errors import error


def check_momentum(momentum: Any) -> None:
    """The share of the old statistics, static or a scalar array; None is cumulative."""
    if momentum is not None and not is_share(momentum):
        raise error(
            "momentum",
            describe(momentum),
            "a number from 0 to 1, a scalar array, or None (cumulative)",
            "It weighs the old statistics: PyTorch's momentum=0.1 is 0.9 here.",
        )


def is_number(value: Any) -> bool:
    """Whether it is a number of Python or NumPy, which bool is not here."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_share(value: Any) -> bool:
    """Whether it is a number from 0 to 1, or a scalar array; of a traced one only the type is known."""
    if isinstance(value, jax.core.Tracer):
        return value.shape == () and jnp.issubdtype(value.dtype, jnp.floating)
    given = np.asarray(value)
    real = any(jnp.issubdtype(given.dtype, kind) for kind in (np.integer, np.floating))
    return given.shape == () and real and bool(0.0 <= given <= 1.0)


def check_flag(flag: Any) -> bool | Array:
    """use_running_average as a bool, or as a scalar array if it is traced."""
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


def check_static(argument: str, flag: Any) -> None:
    """A choice of what is written, which cannot be made while the compiled program runs."""
    if not isinstance(flag, (bool, np.bool_)):
        raise error(
            argument,
            describe(flag),
            "True or False",
            f"Under jit make it static, jax.jit(..., static_argnames={argument!r}), or close over it.",
        )
