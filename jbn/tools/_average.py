"""Averages of whole models: over replicas, and over time."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from jbn._checks import error
from jbn._moments import Moments, merge
from jbn._running import moving_average
from jbn._types import describe
from jbn.tools._trees import Variables, with_statistics

Model = TypeVar("Model", bound=Variables)


def merge_replicas(batch_stats: Any, axis: int = 0) -> Any:
    """Running statistics of several devices that did not synchronise, as one: for evaluation or a checkpoint.

        mean = E[mean_i],  var = E[var_i] + E[(mean_i - mean)^2]

    All replicas weigh the same. The spread of the means counts: averaging the variances alone is too small.

    Args:
      batch_stats: a collection with a replica axis in every array: of one layer or a model, as `pmap` or
        `vmap` returns it.
      axis: the replica axis.

    Returns:
      The collection without that axis. `count` is the largest one, `rows` are summed.

    Raises:
      ValueError: arrays without such an axis, or of different numbers of replicas.

    Example:
      >>> import jax.numpy as jnp, jbn.tools
      >>> replicas = {"mean": jnp.array([[1.0], [3.0]]), "var": jnp.array([[1.0], [1.0]])}
      >>> print(jbn.tools.merge_replicas(replicas))
      {'mean': Array([2.], dtype=float32), 'var': Array([2.], dtype=float32)}
    """
    flat = flatten_dict(batch_stats)
    sizes = {
        value.shape[axis] if -jnp.ndim(value) <= axis < jnp.ndim(value) else None for value in flat.values()
    }
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise error(
            "tools.merge_replicas",
            "batch_stats",
            f"arrays of {', '.join(sorted({describe(value) for value in flat.values()})) or 'no kind'}",
            f"one number of replicas along axis {axis}, in all of them",
            "Pass batch_stats as pmap or vmap returns it, with the axis of the devices.",
        )
    layers = with_statistics(flat)
    merged = {(*path, name) for path in layers for name in ("mean", "var")}
    new = {
        path: (jnp.sum if path[-1] == "rows" else jnp.max)(value, axis)
        for path, value in flat.items()
        if path not in merged
    }
    for path in layers:
        means, variances = (flat[*path, name] for name in ("mean", "var"))
        pairs = zip(jnp.moveaxis(means, axis, 0), jnp.moveaxis(variances, axis, 0), strict=True)
        moments = merge(*(Moments(jnp.ones(var.shape, var.dtype), mean, var) for mean, var in pairs))
        new[*path, "mean"] = moments.mean.astype(means.dtype)
        new[*path, "var"] = moments.var.astype(variances.dtype)
    return unflatten_dict({path: new[path] for path in flat})


def ema(average: Model, new: Model, decay: float | Array) -> Model:
    """An exponential moving average of a whole model: parameters and statistics together.

        average = decay * average + (1 - decay) * new

    Averaged parameters go with averaged statistics, not with the latest and not with the initial ones.
    Integers, such as counters, and random keys are taken from `new`. Computed in float32 or wider; each array
    keeps its dtype.

    Args:
      average: linen variables, an NNX module, or any tree of arrays; not changed.
      new: the same, after a step of training.
      decay: the weight of the old average, from 0 to 1, often 0.999; may be traced.

    Returns:
      The new average.

    Example:
      >>> import jax.numpy as jnp, jbn.tools
      >>> average, new = ({"count": jnp.int32(m), "mean": jnp.array([m])} for m in (0.0, 4.0))
      >>> print(jbn.tools.ema(average, new, 0.75))
      {'count': Array(4, dtype=int32), 'mean': Array([1.], dtype=float32)}

    Reference: Polyak and Juditsky 1992, Acceleration of stochastic approximation by averaging.
    """
    if isinstance(average, nnx.Module):
        graph, old = nnx.split(average)
        averaged: Model = nnx.merge(graph, ema(old, nnx.state(new), decay))
        return averaged
    tree: Model = jax.tree.map(lambda a, n: _moved(a, n, decay), average, new)
    return tree


def _moved(old: Array, new: Array, decay: float | Array) -> Array:
    average, latest = jnp.asarray(old), jnp.asarray(new)
    if not jnp.issubdtype(latest.dtype, jnp.inexact):
        return new
    return moving_average(average, latest, (decay, 1 - decay)).astype(average.dtype)
