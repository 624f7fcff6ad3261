"""Pairs of a layer and the batch norm after it, in a model: the layer takes the batch norm in."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array

from jbn._core.dtypes import reduction_dtype
from jbn._core.errors import named_errors
from jbn._core.running import store_debiased
from jbn._core.statistics import inverse_std
from jbn._core.types import Axes, Dtype
from jbn.tools._fold.arrays import check_fold, folded, stored, times
from jbn.tools._models import Layer, Path, Variables, as_dicts, batch_norms, show_path, with_values

Model = TypeVar("Model", bound=Variables)


class Pair(NamedTuple):
    """A layer and the batch norm that is folded into it."""

    layer: Path
    norm: Path
    epsilon: float
    axis: Axes
    momentum: float | None = None
    """By which its evaluation debiases; None: it does not."""

    @property
    def name(self) -> str:
        """The pair for people."""
        return f"{show_path(self.layer)} -> {show_path(self.norm)}"


def folded_model(variables: Model, pairs: Sequence[Pair]) -> Model:
    """The model with these pairs folded."""
    layers, norms = layers_and_norms(variables)
    params, stats = {}, {}
    for pair in pairs:
        with named_errors(layer=repr(pair.name)):
            norm = norms[pair.norm]
            if pair.momentum is not None:
                norm = norm._replace(batch_stats=store_debiased(norm.batch_stats, pair.momentum))
            params[pair.layer], norm = _absorbed(layers[pair.layer], norm, pair.epsilon, pair.axis)
        params[pair.norm], stats[pair.norm] = norm
    new: Model = with_values(variables, params=params, batch_stats=stats)
    return new


def with_norm(variables: Model, path: Path, norm: Layer) -> Model:
    """The model with other values in one batch norm."""
    values = {name: {path: entries} for name, entries in norm._asdict().items()}
    new: Model = with_values(variables, **values)
    return new


def layers_and_norms(variables: Variables) -> tuple[dict[Path, dict[str, Array]], dict[Path, Layer]]:
    """By path, the kernel and bias of everything with a kernel, and every batch norm."""
    trees = as_dicts(variables)
    params = flatten_dict(trees.get("params", {}))
    layers = {
        path[:-1]: {
            name: params[*path[:-1], name] for name in ("kernel", "bias") if (*path[:-1], name) in params
        }
        for path in params
        if path[-1] == "kernel"
    }
    return layers, batch_norms(trees)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _absorbed(
    layer: Mapping[str, Array], norm: Layer, epsilon: float, axis: Axes
) -> tuple[dict[str, Array], Layer]:
    """The layer with the batch norm in it, and the batch norm as the identity, which keeps what cannot go.

    What the batch norm still multiplies by, step, is 1 but for rounding if there is a scale; it is taken out
    of the layer, so that a bfloat16 scale, which cannot hold sqrt(1 + epsilon), does no harm.
    """
    bias = layer.get("bias")
    kernel, axes = check_fold(layer["kernel"], bias, norm.params, norm.batch_stats, epsilon, axis)
    params, var = dict(norm.params), jnp.ones_like(norm.batch_stats["var"])
    step = inverse_std(var.astype(reduction_dtype(var.dtype, kernel.dtype)), epsilon)
    if "scale" in params:
        params["scale"] = jnp.full_like(params["scale"], math.sqrt(1 + epsilon))
        step = times(step, params["scale"])
    scale = norm.params.get("scale", jnp.ones_like(step))
    inner = {"scale": times(scale, 1 / step)}
    if "bias" in params:
        inner["bias"] = times(params["bias"], 1 / step)
    kernel, offset = folded(kernel, bias, inner, norm.batch_stats, epsilon, axes)
    new = {"kernel": stored(kernel, layer["kernel"].dtype)}
    if bias is not None:
        new["bias"], offset = _held(offset, bias.dtype)
    if "bias" in params:
        params["bias"], left = _held(times(offset, step), params["bias"].dtype)
        offset = times(left, 1 / step)
    mean = stored(jnp.zeros_like(offset) - offset, norm.batch_stats["mean"].dtype)
    return new, Layer(params, {**norm.batch_stats, "mean": mean, "var": var})


def _held(offset: Array, dtype: Dtype) -> tuple[Array, Array]:
    """What an entry of this dtype takes of the offset, and what is left: a real one takes nothing complex."""
    nothing = jnp.zeros_like(offset)
    if jnp.iscomplexobj(offset) and not jnp.issubdtype(dtype, jnp.complexfloating):
        return nothing.real.astype(dtype), offset
    return offset.astype(dtype), nothing
