"""What is wrong with a call, in four parts: which argument, what came, what was expected, how to mend it.

An error is raised where the fault is found, by code that does not know which function the user called. The
first public function that it passes on its way out gives it its name.
"""

import contextlib
import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_LONGEST = 160
"""Characters of a value in an error text; of a name half as many, of all that came twice as many."""

_NOT_THE_USERS = ("jbn", "flax", "jax", "contextlib")
"""Packages whose lines a warning does not name."""


class ArgumentError(ValueError):
    """An argument that jbn cannot work with: what is wrong, in which function, at which layer of a model."""

    def __init__(self, text: str, function: str = "", layer: str = "") -> None:
        super().__init__(text, function, layer)

    def __str__(self) -> str:
        text, *names = self.args
        return ": ".join(part for part in (" ".join(filter(None, names)), text) if part)


class UnboundAxisError(ArgumentError, NameError):
    """An `axis_name` that nothing around the call binds; JAX and Flax raise `NameError` for it."""


def error(
    argument: str, got: str, expected: str, fix: str, kind: type[ArgumentError] = ArgumentError
) -> ArgumentError:
    """The one builder of error texts. What came is cut if it is long: the rest of the text has to be seen."""
    return kind(f"{argument} is {_shorten(got, 2 * _LONGEST)}. Expected {expected}. {fix}")


def describe(value: Any) -> str:
    """How error texts show an argument: `float32[8,3]` for an array, the begin of its repr for others."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, type):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return _shorten(" ".join(repr(value).split()), _LONGEST)


def _shorten(text: str, most: int) -> str:
    """The begin of a text that may be of any length, such as that of whole arrays."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def join_names(names: Iterable[Any], most: int = 4) -> str:
    """The first few names, for people."""
    named = list(names)
    shown = [_shorten(str(name), _LONGEST // 2) for name in named[:most]]
    return ", ".join([*shown, f"and {len(named) - most} more"] if len(named) > most else shown)


def warn_user(text: str) -> None:
    """A `UserWarning` at the line of the user's code from which this package, or Flax, was called.

    How far that is away differs: modules of Flax and contexts may lie between.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


@contextlib.contextmanager
def named_errors(function: str = "", *, layer: str = "") -> Iterator[None]:
    """Errors that leave the block have this function and this layer, unless they have a function already."""
    try:
        yield
    except ArgumentError as passing:
        text, named, inner_layer = passing.args
        if not named:
            passing.args = (text, function, inner_layer or layer)
        raise


def public(function: Callable[P, T]) -> Callable[P, T]:
    """A public function, or method, whose errors have its public name: that of its package and its own."""
    package = itertools.takewhile(lambda part: not part.startswith("_"), function.__module__.split("."))
    name = ".".join([*package, function.__qualname__])

    @functools.wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> T:
        with named_errors(name):
            return function(*args, **kwargs)

    return named
