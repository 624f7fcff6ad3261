"""The proof that folding changed nothing: the same outputs of a model, or of each pair, before and after."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console

from jbn._core.dtypes import reduction_dtype
from jbn._core.errors import error
from jbn._core.sharding import sharded_like
from jbn._core.types import Dtype
from jbn.tools._fold.absorb import Model, Pair, folded_model, layers_and_norms, with_norm
from jbn.tools._fold.outputs import outputs_of, outputs_of_pairs
from jbn.tools._models import Layer

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
        return f"{', '.join(pair.name for pair in self.pairs)}, which {self.what}"


def proved(
    variables: Model,
    pairs: Sequence[Pair],
    call: Callable[[Any, Any], Any] | None,
    x: Any,
    dtypes: set[Dtype],
    *,
    found: bool,
) -> Model:
    """The model with these pairs folded. What is not proved is left out if it was found, else an error."""
    outputs = functools.partial(outputs_of_pairs, pairs) if call is None else outputs_of(call, x)
    while pairs:
        new = folded_model(variables, pairs)
        fault = _fault(pairs, variables, new, outputs, dtypes, by_call=call is not None)
        if fault is None:
            return new
        if not found:
            raise error("pairs", f"a sequence with {fault.got}", fault.expected, fault.fix)
        Console().out(f"not folded: {fault.got}", highlight=False)  # beside the pairs found, shown too
        pairs = [pair for pair in pairs if pair not in fault.pairs]
    return folded_model(variables, [])


def _fault(
    pairs: Sequence[Pair],
    old: Model,
    new: Model,
    outputs: Callable[[Model], list[Array]],
    dtypes: set[Dtype],
    *,
    by_call: bool,
) -> _Fault | None:
    """The pairs that move an output when folded alone; else those by whose batch norm no output moves.

    With the latter the proof proves nothing: no output would show that they are wrong.
    """
    before = outputs(old)
    layers, norms = layers_and_norms(old)
    stored = [layers[pair.layer] for pair in pairs], [norms[pair.norm] for pair in pairs]
    allowed = _allowed_move({leaf.dtype for leaf in jax.tree.leaves((before, stored))} | dtypes)
    moved = _largest_move(before, outputs(new))
    if moved > allowed:
        alone = [
            pair for pair in pairs if _largest_move(before, outputs(folded_model(old, [pair]))) > allowed
        ]
        what = f"moves outputs by {moved:.1e} of the largest"
        return _Fault(alone or pairs, what, f"at most {allowed:.1e}", _HARM)
    hidden = [
        pair for pair in pairs if by_call and _largest_move(before, outputs(_disturbed(old, pair))) <= allowed
    ]
    if not hidden:
        return None
    expected = f"pairs whose batch norm moves an output by more than {allowed:.1e} of the largest"
    return _Fault(hidden, "the outputs of call do not show", expected, _HIDDEN)


def _disturbed(model: Model, pair: Pair) -> Model:
    """The model with other values in the batch norm of one pair."""
    _, norms = layers_and_norms(model)
    return with_norm(model, pair.norm, _with_more(norms[pair.norm], pair.epsilon))


@functools.partial(jax.jit, static_argnums=1)
def _with_more(norm: Layer, epsilon: float) -> Layer:
    """One or two more in each scale and bias, and so many standard deviations in each mean."""
    rng = np.random.default_rng(0)

    def far(value: Array) -> Array:
        return sharded_like(jnp.asarray(rng.uniform(1.0, 2.0, value.shape)).astype(value.dtype), value)

    mean, var = norm.batch_stats["mean"], norm.batch_stats["var"]
    deviation = jnp.sqrt(var.astype(reduction_dtype(var.dtype)) + epsilon)
    params = {name: value + far(value) for name, value in norm.params.items()}
    return Layer(params, {**norm.batch_stats, "mean": mean + (far(deviation) * deviation).astype(mean.dtype)})


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
    old, new = (value.astype(np.complex128) for value in (old, new))
    differs = (old != new) & ~(np.isnan(old) & np.isnan(new))
    old, new, finite = old[differs], new[differs], old[np.isfinite(old)]
    if not (np.isfinite(old) & np.isfinite(new)).all():
        return np.inf
    return float(np.abs(new - old).max(initial=0.0) / (np.abs(finite).max(initial=0.0) or 1.0))
