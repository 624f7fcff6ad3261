"""Outputs that show whether a model has changed: of all of it on random input, or of each pair alone."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from numpy.lib.array_utils import normalize_axis_tuple

from jbn._core.batch_norm import batch_norm
from jbn._core.dtypes import compute_dtype, promote_stats
from jbn._core.errors import describe, error
from jbn._core.types import Axes
from jbn.tools._fold.absorb import Pair, layers_and_norms
from jbn.tools._fold.arrays import plus
from jbn.tools._fold.pairs import evaluating
from jbn.tools._models import Layer, Variables


def outputs_of(call: Callable[[Any, Any], Any], x: Any) -> Callable[[Any], list[Array]]:
    """A function of a model: the floating outputs of `call` on random input like x, in evaluation."""
    x = random_like(x)

    @functools.partial(jax.jit, static_argnums=0)
    def run(graph: Any, state: Any, x: Any) -> Any:
        return call(state if graph is None else nnx.merge(graph, state), x)

    def outputs(model: Any) -> list[Array]:
        graph = None
        if isinstance(model, nnx.Module):
            graph, model = nnx.split(evaluating(model))
        with jax.default_matmul_precision("highest"):  # TF32 and bfloat16 passes would move them by more
            leaves = jax.tree.leaves(run(graph, model, x))
        floating = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        if not floating:
            got = f"a function that returns {', '.join(map(describe, leaves)) or 'nothing'}"
            expected = "floating outputs, by which the proof sees a change"
            fix = "Return the logits, and not their argmax."
            raise error("call", got, expected, fix)
        return floating

    return outputs


def outputs_of_pairs(pairs: Sequence[Pair], model: Variables) -> list[Array]:
    """Each layer and batch norm by itself, on random patches."""
    layers, norms = layers_and_norms(model)
    with jax.default_matmul_precision("highest"):
        return [_through(layers[pair.layer], norms[pair.norm], pair.epsilon, pair.axis) for pair in pairs]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _through(layer: Mapping[str, Array], norm: Layer, epsilon: float, axis: Axes) -> Array:
    """The kernel contracted with random patches, in a wide dtype, the bias, and the batch norm."""
    kernel = layer["kernel"].astype(compute_dtype(layer["kernel"].dtype))
    features = normalize_axis_tuple(axis, kernel.ndim)
    others = tuple(a for a in range(kernel.ndim) if a not in features)
    patches = jnp.asarray(
        random_like(jax.ShapeDtypeStruct((16, *(kernel.shape[a] for a in others)), kernel.dtype))
    )
    y = jnp.tensordot(patches, kernel, axes=(tuple(range(1, patches.ndim)), others))
    if "bias" in layer:
        y = plus(y, layer["bias"][None])
    feature_axes = tuple(range(1, y.ndim))
    stats = promote_stats(norm.batch_stats, y)
    y, _ = batch_norm(norm.params, stats, y, use_running_average=True, epsilon=epsilon, axis=feature_axes)
    return y


def random_like(x: Any) -> Any:
    """The tree x with random values, the same each time, as far as they are data.

    - Floating and complex leaves: standard normal values.
    - Integers: from the smallest to the largest of the leaf, as ids must stay in a vocabulary. Where all are
      the same, as in an example of zeros, up to that value and at least to 1; of 8 bits, all there are.
    - Booleans of one axis or more: both.
    - Scalars that are integers or booleans are settings, and stay; so do keys.
    """
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            values = rng.standard_normal(leaf.shape)
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                values = values + 1j * rng.standard_normal(leaf.shape)
            return values.astype(leaf.dtype)
        if 0 in leaf.shape or leaf.shape == () or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        abstract = isinstance(leaf, jax.ShapeDtypeStruct)
        low, high = _range(np.zeros(1, leaf.dtype) if abstract else np.asarray(leaf))
        return rng.integers(low, high, leaf.shape, endpoint=True).astype(leaf.dtype)

    return jax.tree.map(fill, x)


def _range(values: np.ndarray) -> tuple[int, int]:
    """Of random integers or booleans like these."""
    low, high = int(values.min()), int(values.max())
    if values.dtype == bool:
        return 0, 1
    if low < high:
        return low, high
    info = jnp.iinfo(values.dtype)
    return (int(info.min), int(info.max)) if info.bits <= 8 else (min(low, 0), max(high, 1))
