"""Models as the tools see them: linen variables and NNX modules alike, as collections of nested dicts.

A batch norm is found by where statistics live: every place with a running mean and variance, whatever its
name. Its parameters are at the same place.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
from flax import nnx
from flax.core import FrozenDict, freeze, meta, unfreeze
from flax.traverse_util import flatten_dict
from jaxtyping import Array

from jbn._checks import error
from jbn._moments import Moments
from jbn._types import describe
from jbn.nnx import BatchMoments

Path: TypeAlias = tuple[str | int, ...]
Variables: TypeAlias = Mapping[str, Any] | nnx.Module

_NNX_COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat, "batch_moments": BatchMoments}


class Layer(NamedTuple):
    """One batch norm of a model: scale and bias as far as it has them, and its running statistics."""

    params: dict[str, Array]
    batch_stats: dict[str, Array]


def collections(call: str, variables: Variables) -> dict[str, Any]:
    """The collections of a model as nested dicts: new dicts, the same arrays, out of their boxes if any."""
    if isinstance(variables, nnx.Module):
        states = {name: nnx.state(variables, kind) for name, kind in _NNX_COLLECTIONS.items()}
        return {name: nnx.to_pure_dict(state) for name, state in states.items()}
    if not isinstance(variables, Mapping):
        raise error(
            call,
            "variables",
            describe(variables),
            "linen variables or an NNX module",
            "For a linen model pass {'params': params, 'batch_stats': batch_stats}.",
        )
    return {
        name: jax.tree.map(lambda leaf: leaf, unfreeze(meta.unbox(tree))) for name, tree in variables.items()
    }


def rebuilt(variables: Variables, **changed: Any) -> Any:
    """A model like `variables` with other values in some collections; the given one stays as it is."""
    if not isinstance(variables, nnx.Module):
        new = {**variables} | {name: refilled(variables[name], tree) for name, tree in changed.items()}
        return freeze(new) if isinstance(variables, FrozenDict) else new
    model = nnx.clone(variables)
    for name, tree in changed.items():
        state = nnx.state(model, _NNX_COLLECTIONS[name])
        nnx.replace_by_pure_dict(state, tree)
        nnx.update(model, state)
    return model


def refilled(tree: Any, values: Any) -> Any:
    """The values of a nested dict in a tree of the same names: frozen and boxed where that is."""
    places, structure = jax.tree.flatten(tree, is_leaf=meta.is_axis_metadata)
    return jax.tree.unflatten(structure, map(meta.replace_boxed, places, jax.tree.leaves(values)))


def batch_norms(call: str, variables: Variables) -> dict[Path, Layer]:
    """Every batch norm of a model by its path, in the order of the tree."""
    trees = collections(call, variables)
    stats, params = (flatten_dict(trees.get(name, {})) for name in ("batch_stats", "params"))
    paths = with_statistics(stats)
    if not paths:
        raise error(
            call,
            "variables",
            f"a model with the collections {', '.join(trees) or 'none'}",
            "one with a batch norm: a mean and a var in batch_stats",
            "Pass all variables of the model, {'params': params, 'batch_stats': batch_stats}.",
        )
    return {
        path: Layer(
            {name: params[*path, name] for name in ("scale", "bias") if (*path, name) in params},
            {full[-1]: value for full, value in stats.items() if full[:-1] == path},
        )
        for path in paths
    }


def with_statistics(stats: Mapping[Path, Any]) -> list[Path]:
    """The paths of batch norms in a flat `batch_stats`: every place with a mean and a var."""
    return [path[:-1] for path in stats if path[-1] == "mean" and (*path[:-1], "var") in stats]


def batch_moments(call: str, variables: Variables) -> dict[Path, Moments]:
    """What each batch norm left in `batch_moments`, by the layer's path."""
    tree = collections(call, variables).get("batch_moments", {})
    found = flatten_dict(tree, is_leaf=lambda _, value: isinstance(value, Moments))
    return {path[:-1]: value for path, value in found.items()}


def dotted(path: Path) -> str:
    """A path for people."""
    return "/".join(map(str, path))
