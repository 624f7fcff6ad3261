"""The proof that folding changed nothing: the same outputs of a model, or of each pair, before and after."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from numpy.lib.array_utils import normalize_axis_tuple

from jbn._batch_norm import batch_norm
from jbn._checks import error
from jbn._types import Axes, Dtype, kept, working
from jbn.tools._absorb import FOLD_VARIABLES, Model, Pair, folded_model, layers_and_norms
from jbn.tools._find import evaluating
from jbn.tools._fold import plus
from jbn.tools._trees import Layer, Variables


def prove(
    pairs: Sequence[Pair], old: Model, new: Model, outputs: Callable[[Model], list[Array]], dtypes: set[Dtype]
) -> None:
    """No output has moved; else the error names the pairs to blame: those that move it when folded alone."""
    before = outputs(old)
    layers, norms = layers_and_norms(old)
    stored = [layers[pair.layer] for pair in pairs], [norms[pair.norm] for pair in pairs]
    allowed = _allowed_move({leaf.dtype for leaf in jax.tree.leaves((before, stored))} | dtypes)
    moved = _largest_move(before, outputs(new))
    if moved <= allowed:
        return
    alone = {pair.name: _largest_move(before, outputs(folded_model(old, [pair]))) for pair in pairs}
    blamed = [name for name, moved in alone.items() if not moved <= allowed] or list(alone)
    raise error(
        FOLD_VARIABLES,
        "pairs",
        f"a sequence with {', '.join(blamed)}, which moves outputs by {moved:.1e} of the largest",
        f"at most {allowed:.1e}",
        "Leave the pair out: something else uses the layer's output too, or stands between it and the batch "
        "norm, or its epsilon is another, or the new values do not fit their dtype.",
    )


def outputs_of(call: Callable[[Any, Any], Any], x: Any) -> Callable[[Any], list[Array]]:
    """A function of a model: the floating outputs of `call` on random input like x, in evaluation."""
    x = _random_like(x)

    @functools.partial(jax.jit, static_argnums=0)
    def run(graph: Any, state: Any, x: Any) -> Any:
        return call(state if graph is None else nnx.merge(graph, state), x)

    def outputs(model: Any) -> list[Array]:
        graph = None
        if isinstance(model, nnx.Module):
            graph, model = nnx.split(evaluating(model))
        with jax.default_matmul_precision("highest"):  # TF32 and bfloat16 passes would move them by more
            leaves = jax.tree.leaves(run(graph, model, x))
        return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    return outputs


def outputs_of_pairs(pairs: Sequence[Pair], model: Variables) -> list[Array]:
    """Each layer and batch norm by itself, on random patches."""
    layers, norms = layers_and_norms(model)
    with jax.default_matmul_precision("highest"):
        return [_through(layers[pair.layer], norms[pair.norm], pair.epsilon, pair.axis) for pair in pairs]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _through(layer: Mapping[str, Array], norm: Layer, epsilon: float, axis: Axes) -> Array:
    """The kernel contracted with random patches, in a wide dtype, the bias, and the batch norm."""
    kernel = layer["kernel"].astype(working(layer["kernel"].dtype))
    features = normalize_axis_tuple(axis, kernel.ndim)
    others = tuple(a for a in range(kernel.ndim) if a not in features)
    patches = jnp.asarray(
        _random_like(jax.ShapeDtypeStruct((16, *(kernel.shape[a] for a in others)), kernel.dtype))
    )
    y = jnp.tensordot(patches, kernel, axes=(tuple(range(1, patches.ndim)), others))
    if "bias" in layer:
        y = plus(y, layer["bias"][None])
    feature_axes = tuple(range(1, y.ndim))
    stats = kept(norm.batch_stats, y)
    y, _ = batch_norm(norm.params, stats, y, use_running_average=True, epsilon=epsilon, axis=feature_axes)
    return y


def _random_like(x: Any) -> Any:
    """The tree x with standard normal values, the same each time, in its floating and complex leaves."""
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        values = rng.standard_normal(leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            values = values + 1j * rng.standard_normal(leaf.shape)
        return values.astype(leaf.dtype)

    return jax.tree.map(fill, x)


def _allowed_move(dtypes: set[Dtype]) -> float:
    """1e-5, or 4 epsilons of the coarsest dtype.

    A new kernel is rounded once, and its layer computes in its dtype: half an epsilon each. The errors of
    layers add up like a random walk, so that 4 epsilons leave room for some ten layers.
    """
    return max(
        1e-5, *(4 * float(jnp.finfo(dtype).eps) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact))
    )


def _largest_move(before: Sequence[Array], after: Sequence[Array]) -> float:
    """The largest change of an output, relative to the largest value of that output. NaN where one is NaN."""
    changes = [np.nan] if not before else []
    for pair in zip(before, after, strict=True):
        old, new = (np.asarray(value).astype(np.complex128) for value in pair)
        changes.append(np.abs(new - old).max(initial=0.0) / (np.abs(old).max(initial=0.0) or 1.0))
    return float(np.max(changes))
