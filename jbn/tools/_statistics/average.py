"""Averages of whole models: over replicas, and over time."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import DictKey
from jaxtyping import Array

from jbn._core.dtypes import compute_dtype, reduction_dtype, unwrapped
from jbn._core.errors import describe, error, join_names, public
from jbn._core.moments import Moments, merge_stacked
from jbn._core.options import is_unit_interval
from jbn._core.running import Decay, moving_average
from jbn.tools._models import (
    Path,
    Variables,
    as_dicts,
    errors_at,
    join_paths,
    path_name,
    replace_collections,
    with_statistics,
)

Model = TypeVar("Model", bound=Variables)
Stats = TypeVar("Stats", bound=Mapping[str, Any] | nnx.Module)

_REPLICAS = "Pass batch_stats as pmap or vmap returns it, with the axis of the devices."


@public
def merge_replicas(batch_stats: Stats, axis: int = 0) -> Stats:
    """Merges running statistics of devices that did not synchronize, for evaluation or a checkpoint.

        mean = E[mean_i],  var = E[var_i + (mean_i - mean)^2]

    Replicas weigh by their `rows`, or equally if they keep none. The spread of the means is part of the
    variance: the average of the variances alone is too small. For layers with `debias=True` merge what
    `jbn.tools.debias` returns: the initial 0 and 1 belong to no replica.
    Under `jit` the replicas may be sharded over devices, along explicit mesh axes too.

    Args:
      batch_stats: the collection of one layer or a linen model, the `nnx.State` of an NNX model's
        `nnx.BatchStat`, or the module itself, with a replica axis in each of these arrays, as `pmap` or
        `vmap` returns them.
      axis: the replica axis.

    Returns:
      The same kind without that axis in the statistics. `count` is the largest one, `rows` are summed; what
      else a module holds stays as it is.

    Raises:
      ValueError: arrays without such an axis, of different numbers of replicas, or of other layers.

    Example:
      >>> import jax.numpy as jnp, jbn.tools
      >>> replicas = {"mean": jnp.array([[1.0], [3.0]]), "var": jnp.array([[1.0], [1.0]])}
      >>> print(jbn.tools.merge_replicas(replicas))
      {'mean': Array([2.], dtype=float32), 'var': Array([2.], dtype=float32)}
    """
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        fix = "Name the axis of the devices: 0 behind pmap and vmap."
        raise error("axis", repr(axis), "an integer", fix)
    if isinstance(batch_stats, nnx.State):
        state: Any = jax.tree.map(lambda leaf: leaf, batch_stats)
        nnx.replace_by_pure_dict(state, _merge_replicas(nnx.to_pure_dict(batch_stats), axis))
        return cast(Stats, state)
    is_module = isinstance(batch_stats, nnx.Module)
    if not is_module and not isinstance(batch_stats, Mapping):
        kinds = "a collection, an nnx.State or an NNX module"
        raise error("batch_stats", describe(batch_stats), kinds, _REPLICAS)
    variables: Any = batch_stats if is_module else {"batch_stats": batch_stats}
    tree = _merge_replicas(as_dicts(variables)["batch_stats"], axis)
    new = replace_collections(variables, batch_stats=tree)
    return cast(Stats, new if is_module else new["batch_stats"])


def _merge_replicas(stats: Any, axis: int) -> Any:
    """`merge_replicas` of a nested dict."""
    flat: dict[Path, Any] = flatten_dict(stats)
    layers = with_statistics(flat)
    if not layers:
        expected = "a mean and a var in one place"
        raise error("batch_stats", "without a batch norm", expected, _REPLICAS)
    known = {(*path, name) for path in layers for name in ("mean", "var", "count", "rows")}
    if other := [path_name(path) for path in flat if path not in known]:
        expected = "mean, var, count and rows of batch norms alone"
        fix = "Leave the others out: jbn cannot know how they are merged."
        raise error("batch_stats", f"one with {join_paths(other)}", expected, fix)
    flat = {path: jnp.asarray(value) for path, value in flat.items()}
    sizes = {value.shape[axis] if -value.ndim <= axis < value.ndim else None for value in flat.values()}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        got = f"arrays of {join_names(sorted({describe(value) for value in flat.values()}))}"
        expected = f"one number of replicas along axis {axis}, in all of them"
        raise error("batch_stats", got, expected, _REPLICAS)
    for path in layers:
        mean, var = flat[*path, "mean"], flat[*path, "var"]
        with errors_at(path):
            _check_replicas(mean, var)
        flat[*path, "mean"], flat[*path, "var"] = _pool_replicas(mean, var, flat.get((*path, "rows")), axis)
        for name, reduce in (("count", jnp.max), ("rows", jnp.sum)):
            if (*path, name) in flat:
                flat[*path, name] = reduce(flat[*path, name], axis).astype(flat[*path, name].dtype)
    return unflatten_dict(flat)


def _check_replicas(mean: Array, var: Array) -> None:
    """Statistics of a layer, with an axis in front of that of the channels."""
    kinds = jnp.issubdtype(mean.dtype, jnp.inexact) and jnp.issubdtype(var.dtype, jnp.floating)
    if not kinds or mean.shape != var.shape:
        got = f"{describe(mean)} and {describe(var)}"
        raise error("mean and var", got, "floating arrays of one shape", _REPLICAS)
    if mean.ndim < 2:
        raise error("mean", describe(mean), "an axis of replicas and one of channels", _REPLICAS)


def _pool_replicas(means: Array, variances: Array, rows: Array | None, axis: int) -> tuple[Array, Array]:
    """Mean and variance of all replicas together, by their rows."""
    mean = jnp.moveaxis(means.astype(compute_dtype(means.dtype, variances.dtype)), axis, 0)
    var = jnp.moveaxis(variances.astype(reduction_dtype(mean.dtype)), axis, 0)
    weights = jnp.ones_like(var)
    if rows is not None:
        some = jnp.any(rows > 0, axis, keepdims=True)  # before the first update all are alike
        weights = jnp.moveaxis(jnp.where(some, rows, jnp.ones_like(rows)).astype(var.dtype), axis, 0)
    merged = merge_stacked(Moments(weights, mean, var))
    return merged.mean.astype(means.dtype), merged.var.astype(variances.dtype)


@public
def ema(average: Model, new: Model, decay: float | Array) -> Model:
    """An exponential moving average of a whole model: parameters and statistics together.

        average = decay * average + (1 - decay) * new

    Averaged parameters go with averaged statistics, not with the latest and not with the initial ones.
    Integers and random keys are taken from `new`, and so are the counters `count` and `rows` of batch norms.
    Computed in float32 or wider; each array keeps its dtype. For layers with `debias=True` average what
    `jbn.tools.debias` returns for both models.

    Args:
      average: linen variables, an NNX module, or any tree of arrays; not changed.
      new: the same, after a step of training.
      decay: the weight of the old average, from 0 to 1, often 0.999; may be traced.

    Returns:
      The new average, which shares no array with `new`.

    Raises:
      ValueError: trees that differ in structure or shapes, a decay outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, jbn.tools
      >>> average, new = ({"count": jnp.int32(m), "mean": jnp.array([m])} for m in (0.0, 4.0))
      >>> print(jbn.tools.ema(average, new, 0.75))
      {'count': Array(4, dtype=int32), 'mean': Array([1.], dtype=float32)}

    Reference: Polyak and Juditsky 1992, Acceleration of stochastic approximation by averaging.
    """
    decay = unwrapped(decay)
    _check_decay(decay)
    if isinstance(average, nnx.Module) and isinstance(new, nnx.Module):
        graph, old = nnx.split(average)
        averaged: Model = nnx.merge(graph, _move_tree(old, nnx.state(new), decay))
        return averaged
    return _move_tree(average, new, decay)


def _move_tree(average: Model, new: Model, decay: float | Array) -> Model:
    """`ema` of trees."""
    if len({jax.tree.structure(tree) for tree in (average, new)}) > 1:
        raise error(
            "new",
            "of another structure than average",
            "the same model after a step of training",
            "Start with average = jax.tree.map(jnp.copy, model), or nnx.clone(model).",
        )
    paths = {path for path, _ in jax.tree_util.tree_leaves_with_path(average)}

    def move(path: tuple[Any, ...], old: Array, new: Array) -> Array:
        counts = any(
            (*path[:place], DictKey("mean"), *path[place + 1 :]) in paths
            for place in range(len(path))
            if path[place] == DictKey("rows")
            and not any(isinstance(key, DictKey) for key in path[place + 1 :])
        )
        return _move_towards(jax.tree_util.keystr(path), old, new, 0.0 if counts else decay)

    tree: Model = jax.tree_util.tree_map_with_path(move, average, new)
    return tree


def _check_decay(decay: Any) -> None:
    if not is_unit_interval(decay):
        raise error(
            "decay",
            describe(decay),
            "a number from 0 to 1, or a scalar array",
            "It weighs the old average: 0.999 is usual.",
        )


def _move_towards(name: str, old: Array, new: Array, decay: float | Array) -> Array:
    average, latest = jnp.asarray(old), jnp.asarray(new)
    if average.shape != latest.shape:
        expected = f"shape {average.shape}, as in average"
        raise error(f"new{name}", describe(latest), expected, "Average one and the same model.")
    if not jnp.issubdtype(latest.dtype, jnp.inexact):
        return jnp.copy(latest)  # not `new` itself, whose buffer the caller may donate
    return moving_average(average, latest, Decay(decay, 1 - decay)).astype(average.dtype)
