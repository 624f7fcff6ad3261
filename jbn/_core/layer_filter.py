"""Which layers of a model are meant: by a glob on their path, or a predicate of it."""

import fnmatch
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


def check_where(where: Any, classes: Any, base: type) -> None:
    """A glob or a predicate, and a tuple of classes of modules."""
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
