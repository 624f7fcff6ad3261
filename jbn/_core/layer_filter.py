"""Which layers of a model are meant: by a glob on their path, or a predicate of it."""

import fnmatch
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from jbn._core.errors import describe, error

Where: TypeAlias = str | Callable[[str], bool] | None
"""A glob such as `"backbone/*"`, in which `*` crosses `/`, or a predicate of the path; None is all layers."""


def matches(where: Where, path: str) -> bool:
    """Whether the layer at this path, its names joined by `/`, is meant."""
    if where is None:
        return True
    return fnmatch.fnmatchcase(path, where) if isinstance(where, str) else bool(where(path))


def check_where(where: Any, classes: Any, base: type, ours: type) -> None:
    """A glob or a predicate, and a tuple of classes of modules that are called as the layer of ours is."""
    if not (where is None or isinstance(where, str) or callable(where)):
        raise error(
            "where",
            describe(where),
            "a glob on the paths of layers, a predicate of a path, or None",
            'For example where="backbone/*", or where=lambda path: path.startswith("backbone").',
        )
    if not isinstance(classes, (tuple, list)) or not all(
        isinstance(kind, type) and issubclass(kind, base) for kind in classes
    ):
        raise error(
            "classes",
            repr(classes),
            "a tuple of classes of modules",
            "For example classes=(TheirBatchNorm,).",
        )
    for kind in classes:
        if other := set(_arguments(kind)) - set(_arguments(ours)):
            raise error(
                "classes",
                f"one with {kind.__name__}, called with {', '.join(sorted(other))}",
                f"classes that are called with x, and at most {', '.join(_arguments(ours))}",
                "Let it take use_running_average in its call, as Flax's layer does.",
            )


def _arguments(kind: Any) -> list[str]:
    """The names of what modules of this class are called with, behind x."""
    parameters = list(inspect.signature(kind.__call__).parameters.values())[2:]
    return [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
