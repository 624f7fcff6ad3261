"""Models as the tools see them: linen variables and NNX modules alike, as collections of nested dicts.

A batch norm is found by where statistics live: every place with a running mean and variance, whatever its
name. Its parameters are at the same place.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict, freeze, meta, unfreeze
from flax.traverse_util import flatten_dict
from jax.tree_util import DictKey
from jaxtyping import Array

from jbn._core.errors import describe, error, join_names, named_errors
from jbn._core.moments import Moments
from jbn.nnx import BatchMoments

Path: TypeAlias = tuple[str | int, ...]
Variables: TypeAlias = Mapping[str, Any] | nnx.Module

_NNX_COLLECTIONS: dict[str, Any] = {
    "params": nnx.Param,
    "batch_stats": nnx.All(nnx.BatchStat, nnx.Not(BatchMoments)),
    "batch_moments": BatchMoments,
}
_ALL = "Pass all variables of the model, {'params': params, 'batch_stats': batch_stats}."


class Layer(NamedTuple):
    """One batch norm of a model: scale and bias as far as it has them, and its running statistics."""

    params: dict[str, Array]
    batch_stats: dict[str, Array]


def as_dicts(variables: Variables) -> dict[str, Any]:
    """The collections of a model as nested dicts: new dicts, the same arrays, out of their boxes if any."""
    if isinstance(variables, nnx.Module):
        states = {name: nnx.state(variables, kind) for name, kind in _NNX_COLLECTIONS.items()}
        return {name: nnx.to_pure_dict(state) for name, state in states.items()}
    if not isinstance(variables, Mapping):
        raise error(
            "variables",
            describe(variables),
            "linen variables or an NNX module",
            "For a linen model pass {'params': params, 'batch_stats': batch_stats}.",
        )
    return {
        name: jax.tree.map(lambda leaf: leaf, unfreeze(meta.unbox(tree))) for name, tree in variables.items()
    }


def replace_collections(variables: Variables, **changed: Any) -> Any:
    """A model like `variables` with other values in some collections; the given one stays as it is."""
    if not isinstance(variables, nnx.Module):
        new = {**variables} | {name: unflatten_like(variables[name], tree) for name, tree in changed.items()}
        return freeze(new) if isinstance(variables, FrozenDict) else new
    model = nnx.clone(variables)
    for name, tree in changed.items():
        state = nnx.state(model, _NNX_COLLECTIONS[name])
        nnx.replace_by_pure_dict(state, tree)
        nnx.update(model, state)
    return model


class FlatCollection(NamedTuple):
    """A collection, flattened once, to be written any number of times with other values at some paths."""

    entries: list[Any]
    """Its arrays, each in its box or its NNX variable if it has one."""
    structure: Any
    places: dict[tuple[Any, ...], int]
    """Where in `entries` is what."""

    def fill(self, layers: Mapping[Path, Mapping[str, Array]]) -> Any:
        """The collection with these values, by path and name."""
        entries = list(self.entries)
        for path, layer in layers.items():
            for name, value in layer.items():
                place = self.places[tuple(map(DictKey, (*path, name)))]
                entries[place] = _replace_value(entries[place], value)
        return jax.tree.unflatten(self.structure, entries)


class Template(NamedTuple):
    """A model opened once, to be written any number of times with other values at some paths."""

    collections: Mapping[str, Any]
    flat: dict[str, FlatCollection]
    graph: Any
    """Of an NNX module; None for linen variables."""

    def fill(self, **new: Mapping[Path, Mapping[str, Array]]) -> Any:
        """The collections with these values: a pytree, of linen variables as they were given."""
        changed = {name: self.flat[name].fill(layers) for name, layers in new.items() if any(layers.values())}
        filled = {**self.collections, **changed}
        return freeze(filled) if isinstance(self.collections, FrozenDict) else filled

    def build(self, collections: Any) -> Any:
        """The model of these collections: linen variables as they are, or a new NNX module."""
        return collections if self.graph is None else nnx.merge(self.graph, *collections.values(), copy=True)


def open_template(variables: Variables) -> Template:
    """A model as a template of models like it, with other params and batch_stats."""
    graph, collections = split_module(variables) if isinstance(variables, nnx.Module) else (None, variables)
    flat = {}
    for name in ("params", "batch_stats"):
        if name in collections:
            entries, structure = jax.tree_util.tree_flatten_with_path(collections[name], is_leaf=_is_entry)
            places = {path: place for place, (path, _) in enumerate(entries)}
            flat[name] = FlatCollection([entry for _, entry in entries], structure, places)
    return Template(collections, flat, graph)


def split_module(module: nnx.Module) -> tuple[Any, dict[str, Any]]:
    """The graph of an NNX module, and its variables as collections; `nnx.merge` takes both."""
    graph, *states = nnx.split(module, *_NNX_COLLECTIONS.values(), ...)
    return graph, dict(zip((*_NNX_COLLECTIONS, "others"), states, strict=True))


def _is_entry(value: Any) -> bool:
    """Whether it is the NNX variable or the box of an array, which stays around the new value."""
    return isinstance(value, nnx.Variable) or meta.is_axis_metadata(value)


def _replace_value(entry: Any, value: Array) -> Any:
    """The value in a variable or a box like that of the entry, or as it is."""
    return entry.replace(value) if isinstance(entry, nnx.Variable) else meta.replace_boxed(entry, value)


def with_values(variables: Any, **new: Mapping[Path, Mapping[str, Array]]) -> Any:
    """A model with other values at some paths of its params or batch_stats."""
    template = open_template(variables)
    return template.build(template.fill(**new))


def without_batch_moments(variables: Any) -> Any:
    """A model with no moments in it; an NNX module keeps the variables for them, with no rows."""
    if isinstance(variables, nnx.Module):
        old = as_dicts(variables)["batch_moments"]
        return replace_collections(variables, batch_moments=jax.tree.map(jnp.zeros_like, old))
    rest = {name: tree for name, tree in variables.items() if name != "batch_moments"}
    return freeze(rest) if isinstance(variables, FrozenDict) else rest


def unflatten_like(tree: Any, values: Any) -> Any:
    """The values of a nested dict in a tree of the same names: frozen and boxed where that is."""
    places, structure = jax.tree.flatten(tree, is_leaf=meta.is_axis_metadata)
    return jax.tree.unflatten(structure, map(meta.replace_boxed, places, jax.tree.leaves(values)))


def batch_norms(variables: Variables) -> dict[Path, Layer]:
    """Every batch norm of a model by its path, in the order of the tree."""
    return batch_norms_in(flat_collections(as_dicts(variables)))


def flat_collections(trees: Mapping[str, Any]) -> dict[str, Any]:
    """The collections of a model, of which params and batch_stats are flat: arrays by path and name."""
    flat = dict(trees)
    for name in ("batch_stats", "params"):
        if not isinstance(trees.get(name, {}), dict):
            raise error(f"variables[{name!r}]", describe(trees[name]), "a nested dict of arrays", _ALL)
        if name in trees:
            flat[name] = flatten_dict(trees[name])
    return flat


def batch_norms_in(flat: Mapping[str, Any]) -> dict[Path, Layer]:
    """Every batch norm by its path, from collections that are flat."""
    stats, params = (flat.get(name, {}) for name in ("batch_stats", "params"))
    layers = {path: Layer({}, {}) for path in with_statistics(stats)}
    if not layers:
        full = [name for name, tree in flat.items() if tree]
        raise error(
            "variables",
            f"a model with the collections {join_names(full)}" if full else "a model without arrays",
            "one with a batch norm: a mean and a var in batch_stats",
            _ALL,
        )
    for (*path, name), value in stats.items():
        if tuple(path) in layers:
            layers[tuple(path)].batch_stats[name] = value
    for path, layer in layers.items():
        layer.params.update(
            {name: params[*path, name] for name in ("scale", "bias") if (*path, name) in params}
        )
    return layers


def with_statistics(stats: Mapping[Path, Any]) -> list[Path]:
    """The paths of batch norms in a flat `batch_stats`: every place with a mean and a var."""
    return [path[:-1] for path in stats if path[-1] == "mean" and (*path[:-1], "var") in stats]


def batch_moments(variables: Variables, layers: Iterable[Path]) -> dict[Path, Any]:
    """What each batch norm left in `batch_moments`, by the layer's path."""
    return dict(_by_layer(as_dicts(variables).get("batch_moments", {}), layers))


def moments_in(tree: Any, layers: Iterable[Path]) -> dict[Path, Moments]:
    """The moments in a tree that may hold more, by the layer's path."""
    return {path: value for path, value in _by_layer(tree, layers) if isinstance(value, Moments)}


def _by_layer(tree: Any, layers: Iterable[Path]) -> Iterator[tuple[Path, Any]]:
    """Leaves and their batch norms, at the same path, or in a variable of the layers of linen or NNX."""
    flat = flatten_dict({"": tree}, is_leaf=lambda _, value: isinstance(_as_moments(value), Moments))
    known = set(layers)
    for (_, *path), value in flat.items():
        in_variable = tuple(path) not in known and path[-1:] in (["moments"], ["batch_moments"])
        yield tuple(path[:-1] if in_variable else path), _as_moments(value)


def _as_moments(value: Any) -> Any:
    """Moments out of the dict that a checkpoint makes of them; anything else as it is."""
    is_dict = isinstance(value, Mapping) and set(value) == {"count", "mean", "var"}
    # Statistics with their number of updates have these names too: one number for all channels.
    alike = is_dict and len({getattr(array, "shape", None) for array in value.values()} - {None}) == 1
    return Moments(**value) if alike else value


def moments_of(given: Any, layers: Iterable[Path]) -> dict[Path, Moments]:
    """Moments by the layer's path, from any of the forms in which tools take them."""
    holds = isinstance(given, nnx.Module) or (isinstance(given, Mapping) and "batch_moments" in given)
    layers = list(layers)
    found: Any = batch_moments(given, layers) if holds else given if isinstance(given, Mapping) else {}
    named = {name: _as_moments(value) for name, value in by_name(found).items()}
    wrong = [name for name, value in named.items() if not isinstance(value, Moments)]
    if wrong or not named:
        got = f"a mapping {f'without jbn.Moments at {join_paths(wrong)}' if wrong else 'with nothing'}"
        raise error(
            "moments",
            got if isinstance(given, Mapping) else f"a {type(given).__name__} without batch_moments",
            "a mapping from path to jbn.Moments, or variables or an NNX module with batch_moments",
            "Run the model in training mode: linen with mutable=['batch_stats', 'batch_moments'], NNX after "
            "jbn.nnx.keep_batch_moments(model).",
        )
    paths = {path_name(path): path for path in layers}
    if unknown := [name for name in named if name not in paths]:
        got, expected = (
            f"one with {join_paths(unknown)}",
            f"paths of batch norms: {join_paths(sorted(paths))}",
        )
        raise error("moments", got, expected, "Take moments and variables from the same model.")
    return {paths[name]: value for name, value in named.items()}


def by_name(given: Mapping[Any, Any]) -> dict[str, Any]:
    """What a user gives for paths, each as text or as a tuple, by the text."""
    return {path if isinstance(path, str) else path_name(path): value for path, value in given.items()}


def path_name(path: Path) -> str:
    """A path for people."""
    return "/".join(map(str, path))


def errors_at(path: Path) -> AbstractContextManager[None]:
    """Errors inside are about the layer at this path."""
    return named_errors(layer=repr(path_name(path)) if path else "")


def show_path(path: Path) -> str:
    """A path for people, also that of the model itself."""
    return join_paths([path_name(path)])


def join_paths(paths: Sequence[str], most: int = 4) -> str:
    """The first few paths, for people."""
    return join_names([path or "the model itself" for path in paths], most)
