"""Measuring one batch with a model in training mode: the moments that each of its batch norms leaves."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
from flax import nnx
from flax.traverse_util import flatten_dict

from jbn._core.errors import describe, error
from jbn.linen._replace import only_training_moments, with_empty_moments
from jbn.nnx import BatchNorm, keep_batch_moments
from jbn.nnx._replace import become_ours
from jbn.tools._models import Path, show_path, with_statistics, without_batch_moments


def linen_step(apply_fn: Callable[..., Any], variables: Any) -> tuple[Callable[[Any], Any], dict[Path, str]]:
    """A function from a batch to trees that hold its moments, perhaps among other leaves.

    And the classes of batch norms, by path, that it could not measure; known when it was called.
    """
    options = {"mutable": ("batch_stats", "batch_moments")} if _takes_mutable(apply_fn) else {}

    @jax.jit
    def step(variables: Any, batch: Any) -> Any:
        result = apply_fn(variables, batch, **options)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            is_array = isinstance(result, jax.Array)
            raise error(
                "apply_fn",
                f"one that returns {describe(result) if is_array else f'a {type(result).__name__}'}",
                "one that returns (y, new variables), as model.apply(..., mutable=[...]) does",
                "Hand the options on: lambda variables, x, **options: model.apply(variables, x, train=True, "
                "**options). Pure functions return (y, {'batch_moments': {path: moments}}).",
            )
        return [result[1].get(name, {}) for name in ("batch_stats", "batch_moments")]

    start = without_batch_moments(variables)
    unmeasured: dict[Path, str] = {}

    def measure(batch: Any) -> Any:
        nonlocal start
        with only_training_moments() as (placed, others), nn.intercept_methods(_refuse_bridged):
            try:
                result = step(start, batch)
            except TypeError:
                if not placed:  # by a function that is pure, or has its places already
                    raise
                # An nn.scan that is the whole model has made its carry before a module of linen runs.
                start = with_empty_moments(start)
                result = step(start, batch)
        unmeasured.update(others)
        return result

    return measure, unmeasured


def _refuse_bridged(
    call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """A layer of NNX in a linen model makes its variables anew in each call, and has none for moments."""
    module = context.module
    if isinstance(module, nnx.bridge.ToLinen):
        stats = flatten_dict(module.variables.get("batch_stats", {}))
        if with_statistics(stats):
            got = f"one that runs {show_path(module.path)} by nnx.bridge.to_linen"
            fix = (
                "Use jbn.linen.BatchNorm there, whose variables are the same, or recalibrate the NNX module."
            )
            raise error("apply_fn", got, "batch norms of linen in a linen model", fix)
    return call(*args, **kwargs)


def nnx_step(apply_fn: Callable[..., Any], model: nnx.Module) -> tuple[Callable[[Any], Any], dict[Path, str]]:
    """The same for an NNX module; its random state goes from batch to batch."""
    copy = nnx.clone(model)
    for _, module in nnx.iter_modules(copy):
        if type(module) is nnx.BatchNorm:
            become_ours(module)
    copy.train()
    keep_batch_moments(copy)
    for _, layer in nnx.iter_modules(copy):
        if isinstance(layer, BatchNorm) and layer.batch_moments is not None:
            layer.batch_moments.set_metadata(training_alone=True)
    unmeasured: dict[Path, str] = {
        cast(Path, path): type(module).__name__
        for path, module in nnx.iter_modules(copy)
        if not isinstance(module, BatchNorm)
        and all(isinstance(getattr(module, name, None), nnx.BatchStat) for name in ("mean", "var"))
    }
    graph, whole = nnx.split(copy)
    rngs, state = nnx.split_state(whole, nnx.RngState, ...)

    @jax.jit
    def step(rngs: Any, state: Any, batch: Any) -> Any:
        model = nnx.merge(graph, rngs, state)
        apply_fn(model, batch)
        return nnx.state(model, nnx.RngState), nnx.state(model, nnx.BatchStat)

    def measure(batch: Any) -> Any:
        nonlocal rngs
        with only_training_moments():  # of layers of linen too, in nnx.bridge.ToNNX
            rngs, stats = step(rngs, state, batch)
        return [nnx.to_pure_dict(stats)]

    return measure, unmeasured


def _takes_mutable(apply_fn: Callable[..., Any]) -> bool:
    """Whether a function takes the option of linen's `apply`; a pure one that returns moments need not."""
    try:
        parameters = inspect.signature(apply_fn).parameters
    except (TypeError, ValueError):  # callables without a signature
        return True
    return any(each.name == "mutable" or each.kind is each.VAR_KEYWORD for each in parameters.values())
