"""Measuring one batch with a model in training mode: the moments that each of its batch norms leaves."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jbn._errors import error
from jbn._types import describe
from jbn.linen._models import training_moments_alone
from jbn.nnx import BatchMoments, BatchNorm, keep_batch_moments
from jbn.nnx import replace_batch_norm as replace_nnx
from jbn.tools._trees import without_batch_moments

_CALL = "tools.recalibrate"


def linen_step(apply_fn: Callable[..., Any], variables: Any) -> Callable[[Any], Any]:
    """A function from a batch to the tree of its moments."""

    @jax.jit
    def step(variables: Any, batch: Any) -> Any:
        result = apply_fn(variables, batch, mutable=["batch_stats", "batch_moments"])
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            is_array = isinstance(result, jax.Array)
            raise error(
                _CALL,
                "apply_fn",
                f"one that returns {describe(result) if is_array else f'a {type(result).__name__}'}",
                "one that returns (y, new variables), as model.apply(..., mutable=[...]) does",
                "Hand the options on: lambda variables, x, **options: model.apply(variables, x, train=True, "
                "**options).",
            )
        return result[1].get("batch_moments", {})

    start = without_batch_moments(_CALL, variables)

    def measure(batch: Any) -> Any:
        with training_moments_alone():
            return step(start, batch)

    return measure


def nnx_step(apply_fn: Callable[..., Any], model: nnx.Module) -> Callable[[Any], Any]:
    """The same for an NNX module; its random state goes from batch to batch."""
    copy = replace_nnx(nnx.clone(model))
    copy.train()
    keep_batch_moments(copy)
    for _, layer in nnx.iter_modules(copy):
        if isinstance(layer, BatchNorm) and layer.batch_moments is not None:
            layer.batch_moments.set_metadata(training_alone=True)
    graph, whole = nnx.split(copy)
    rngs, state = nnx.split_state(whole, nnx.RngState, ...)

    @jax.jit
    def step(rngs: Any, state: Any, batch: Any) -> Any:
        model = nnx.merge(graph, rngs, state)
        apply_fn(model, batch)
        return nnx.state(model, nnx.RngState), nnx.state(model, BatchMoments)

    def measure(batch: Any) -> Any:
        nonlocal rngs
        rngs, moments = step(rngs, state, batch)
        return nnx.to_pure_dict(moments)

    return measure
