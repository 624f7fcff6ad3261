"""Which layers of a model are meant: by a glob on their path, or a predicate of it; and by which classes."""

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from jbn._core.errors import describe, error, join_names, warn_user

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
            describe(classes),
            "a tuple of classes of modules",
            "For example classes=(TheirBatchNorm,).",
        )
    for kind in classes:
        if not _takes_the_same(kind, ours):
            raise error(
                "classes",
                f"one with {kind.__name__}, called with {_arguments(kind)}",
                f"classes that are called with {_arguments(ours)}, or with less of it",
                "Let its call be as that of Flax's layer: the mode comes behind x, and is None by default.",
            )


def _takes_the_same(kind: type, ours: type) -> bool:
    """Whether all that calls of this class may give, or leave out, means the same to ours.

    What has no name in its signature may be given to ours by its name, which then checks it.
    """
    theirs, known = _arguments(kind).parameters.values(), _arguments(ours).parameters
    named = [each for each in theirs if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    by_place = [each.name for each in named if each.kind is not each.KEYWORD_ONLY]
    return by_place[1:] in ([], ["use_running_average"]) and all(
        each.name in known and (each.default is each.empty or each.default is known[each.name].default)
        for each in named
        if each.name not in by_place[:1]
    )


def _arguments(kind: Any) -> inspect.Signature:
    """What modules of this class are called with."""
    parameters = list(inspect.signature(kind.__call__).parameters.values())[1:]
    return inspect.Signature([each.replace(annotation=each.empty) for each in parameters])


def warn_of_settings(call: str, unknown: Mapping[str, Iterable[str]]) -> None:
    """A warning of settings of replaced classes that jbn does not know, by the name of the class."""
    for kind, names in unknown.items():
        warn_user(
            f"{call}: {kind} has settings under names that jbn does not have, which are not taken over: "
            f"{join_names(sorted(names))}. Pass what they say as overrides, for example epsilon= for eps."
        )


def settings_of(kind: type, base: type) -> set[str]:
    """The names of values in the body of a class, without those of the framework."""
    bodies = [vars(each) for each in kind.__mro__ if each not in base.__mro__]
    return {
        name
        for body in bodies
        for name, value in body.items()
        if not name.startswith("_") and not callable(value) and not hasattr(value, "__get__")
    }
