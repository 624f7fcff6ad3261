"""The proof that folding changed nothing: the same outputs of a model, or of each pair, before and after."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from numpy.lib.array_utils import normalize_axis_tuple
from rich.console import Console

from jbn._core.arguments import prepare_x
from jbn._core.dtypes import compute_dtype, promote_stats, reduction_dtype
from jbn._core.errors import describe, error, join_names, named_errors
from jbn._core.forward import apply
from jbn._core.options import Options
from jbn._core.running import store_debiased
from jbn._core.sharding import sharded_like
from jbn._core.types import Axes, Dtype
from jbn.tools._fold.arrays import absorb, add
from jbn.tools._fold.pairs import Changes, OpenedModel, Pair, PairArrays, eval_copy
from jbn.tools._models import Layer, Variables, split_module

Outputs: TypeAlias = Callable[[Changes], list[Array]]
"""The outputs of the model with these changes, by which the proof goes."""

_HARM = (
    "Leave the pair out: something else uses the layer's output too, or stands between it and the batch "
    "norm, or its epsilon is another, or the new values do not fit their dtype."
)
_HIDDEN = (
    "A later scale of 0, outputs that are constant, or far larger than what the batch norm adds, hide the "
    "pair: pass another x or call, or values as after training, or leave the pair out."
)


class _Fault(NamedTuple):
    """Pairs that must not be folded, in the parts of an error text."""

    pairs: Sequence[Pair]
    what: str
    expected: str
    fix: str

    @property
    def got(self) -> str:
        """The pairs and what is wrong with them."""
        return f"{join_names(pair.name for pair in self.pairs)}, which {self.what}"


def prove(
    variables: Variables,
    model: OpenedModel,
    pairs: Sequence[Pair],
    call: Callable[[Any, Any], Any] | None,
    x: Any,
    dtypes: set[Dtype],
    *,
    found: bool,
) -> Changes:
    """These pairs, folded. What is not proved is left out if it was found, else it is an error."""
    by_call = call is not None
    outputs = _outputs_by_pair(model, pairs) if call is None else _outputs_by_call(call, variables, model, x)
    folded = {pair: _fold_pair(pair, model.arrays(pair)) for pair in pairs}
    before = outputs({}) if folded else []
    while folded:
        fault = _find_fault(model, folded, before, outputs, dtypes, by_call=by_call)
        if fault is None:
            break
        if not found:
            raise error("pairs", f"a sequence with {fault.got}", fault.expected, fault.fix)
        Console().out(f"not folded: {fault.got}", highlight=False)  # beside the pairs found, shown too
        folded = {pair: arrays for pair, arrays in folded.items() if pair not in fault.pairs}
    return folded


def _fold_pair(pair: Pair, arrays: PairArrays) -> PairArrays:
    """The pair after folding: its batch norm evaluates without debiasing as it did with it."""
    layer, norm = arrays
    with named_errors(layer=repr(pair.name)):
        if pair.momentum is not None:
            norm = norm._replace(batch_stats=store_debiased(norm.batch_stats, pair.momentum))
        return PairArrays(*absorb(layer, norm, pair.epsilon, pair.axis))


def _find_fault(
    model: OpenedModel,
    folded: Changes,
    before: Sequence[Array],
    outputs: Outputs,
    dtypes: set[Dtype],
    *,
    by_call: bool,
) -> _Fault | None:
    """The pairs that move an output when folded alone; else those by whose batch norm no output moves.

    With the latter the proof proves nothing: no output would show that they are wrong.
    """
    given = {pair: model.arrays(pair) for pair in folded}
    allowed = _allowed_move({leaf.dtype for leaf in jax.tree.leaves((before, [*given.values()]))} | dtypes)

    def moves(changes: Changes) -> float:
        return _largest_move(before, outputs(changes))

    moved = moves(folded)
    if moved > allowed:
        alone = [pair for pair, arrays in folded.items() if moves({pair: arrays}) > allowed]
        what = f"moves outputs by {moved:.1e} of the largest"
        return _Fault(alone or [*folded], what, f"at most {allowed:.1e}", _HARM)
    hidden = [pair for pair in given if by_call and moves({pair: _disturb(pair, given[pair])}) <= allowed]
    if not hidden:
        return None
    expected = f"pairs whose batch norm moves an output by more than {allowed:.1e} of the largest"
    return _Fault(hidden, "the outputs of call do not show", expected, _HIDDEN)


def _disturb(pair: Pair, arrays: PairArrays) -> PairArrays:
    """The pair with other values in its batch norm."""
    return arrays._replace(norm=_disturb_norm(arrays.norm, pair.epsilon))


@functools.partial(jax.jit, static_argnums=1)
def _disturb_norm(norm: Layer, epsilon: float) -> Layer:
    """One or two more in each scale and bias, and so many standard deviations in each mean."""
    rng = np.random.default_rng(0)

    def draw(value: Array) -> Array:
        return sharded_like(jnp.asarray(rng.uniform(1.0, 2.0, value.shape)).astype(value.dtype), value)

    mean, var = norm.batch_stats["mean"], norm.batch_stats["var"]
    deviation = jnp.sqrt(var.astype(reduction_dtype(var.dtype)) + epsilon)
    params = {name: value + draw(value) for name, value in norm.params.items()}
    moved_mean = mean + (draw(deviation) * deviation).astype(mean.dtype)
    return Layer(params, {**norm.batch_stats, "mean": moved_mean})


def _allowed_move(dtypes: set[Dtype]) -> float:
    """1e-5, or 4 epsilons of the coarsest dtype.

    A new kernel is rounded once, and its layer computes in its dtype: half an epsilon each. The errors of
    layers add up like a random walk, so that 4 epsilons leave room for some ten layers.
    """
    return max(
        1e-5, *(4 * float(jnp.finfo(dtype).eps) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact))
    )


def _largest_move(before: Sequence[Array], after: Sequence[Array]) -> float:
    """The largest change of an output, relative to the largest finite value of that output.

    Equal infinities, and two NaNs, have not moved; what is finite on one side only has moved infinitely far.
    """
    return max(_move(np.asarray(a), np.asarray(b)) for a, b in zip(before, after, strict=True))


def _move(old: np.ndarray, new: np.ndarray) -> float:
    """The largest change of one output, as `_largest_move` has it."""
    old, new = (value.astype(np.complex128) for value in (old, new))
    differs = (old != new) & ~(np.isnan(old) & np.isnan(new))
    old, new, finite = old[differs], new[differs], old[np.isfinite(old)]
    if not (np.isfinite(old) & np.isfinite(new)).all():
        return np.inf
    return float(np.abs(new - old).max(initial=0.0) / (np.abs(finite).max(initial=0.0) or 1.0))


def _outputs_by_call(
    call: Callable[[Any, Any], Any], variables: Variables, model: OpenedModel, x: Any
) -> Outputs:
    """The floating outputs of `call` on random input like x, in evaluation."""
    x = random_like(x)
    graph = split_module(eval_copy(variables))[0] if isinstance(variables, nnx.Module) else None

    @jax.jit
    def run(collections: Any, x: Any) -> Any:
        return call(collections if graph is None else nnx.merge(graph, *collections.values()), x)

    def outputs(changes: Changes) -> list[Array]:
        with jax.default_matmul_precision("highest"):  # TF32 and bfloat16 passes would move them by more
            leaves = jax.tree.leaves(run(model.write(changes), x))
        floating = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        if not floating:
            got = f"a function that returns {join_names(map(describe, leaves)) or 'nothing'}"
            expected = "floating outputs, by which the proof sees a change"
            fix = "Return the logits, and not their argmax."
            raise error("call", got, expected, fix)
        return floating

    return outputs


def _outputs_by_pair(model: OpenedModel, pairs: Sequence[Pair]) -> Outputs:
    """Each layer and batch norm by itself, on random patches."""

    def outputs(changes: Changes) -> list[Array]:
        with jax.default_matmul_precision("highest"):
            return [_outputs_of_pair(pair, changes.get(pair, model.arrays(pair))) for pair in pairs]

    return outputs


def _outputs_of_pair(pair: Pair, arrays: PairArrays) -> Array:
    with named_errors(layer=repr(pair.name)):
        y: Array = _run_pair(*arrays, pair.epsilon, pair.axis)
    return y


@functools.partial(jax.jit, static_argnums=(2, 3))
def _run_pair(layer: Mapping[str, Array], norm: Layer, epsilon: float, axis: Axes) -> Array:
    """The kernel contracted with random patches, in float32 or wider, the bias, and the batch norm."""
    kernel = layer["kernel"].astype(compute_dtype(layer["kernel"].dtype))
    features = normalize_axis_tuple(axis, kernel.ndim)
    others = tuple(a for a in range(kernel.ndim) if a not in features)
    # Real ones, also for a complex kernel: folding may make a real kernel complex.
    shape = (16, *(kernel.shape[a] for a in others))
    patches = random_like(jax.ShapeDtypeStruct(shape, reduction_dtype(kernel.dtype))).astype(kernel.dtype)
    y = jnp.tensordot(patches, kernel, axes=(tuple(range(1, patches.ndim)), others))
    if "bias" in layer:
        y = add(y, layer["bias"][None])
    y, axes = prepare_x(y, tuple(range(1, y.ndim)))
    stats, dtype = promote_stats(norm.batch_stats, y), compute_dtype(y.dtype, *_dtypes(norm.params))
    y, _, _ = apply(y, axes, norm.params, stats, True, Options(epsilon=epsilon), dtype=dtype)
    return y


def _dtypes(tree: Any) -> set[Dtype]:
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


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
        low, high = _bounds(np.zeros(1, leaf.dtype) if abstract else np.asarray(leaf))
        return rng.integers(low, high, leaf.shape, endpoint=True).astype(leaf.dtype)

    return jax.tree.map(fill, x)


def _bounds(values: np.ndarray) -> tuple[int, int]:
    """Of random integers or booleans like these."""
    low, high = int(values.min()), int(values.max())
    if values.dtype == bool:
        return 0, 1
    if low < high:
        return low, high
    info = jnp.iinfo(values.dtype)
    return (int(info.min), int(info.max)) if info.bits <= 8 else (min(low, 0), max(high, 1))
