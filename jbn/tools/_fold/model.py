"""Folding in a model: pairs are found or named, every batch norm goes into its layer, and that is proved."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

from jbn._core.errors import describe, error, public
from jbn._core.options import check_epsilon
from jbn._core.types import Axes
from jbn.tools._fold.pairs import Pair, find_pairs, kernel_axes, open_model, resolve_pairs, trace_calls
from jbn.tools._fold.proof import prove
from jbn.tools._models import Variables, as_dicts

Model = TypeVar("Model", bound=Variables)


@public
def fold_variables(
    variables: Model,
    pairs: Sequence[tuple[Any, Any]] | None = None,
    *,
    call: Callable[[Any, Any], Any] | None = None,
    x: Any = None,
    epsilon: float = 1e-5,
    axis: Axes = -1,
) -> Model:
    """Folds batch norms of a model into the layers before them, and proves that the outputs stay.

    The layers get the kernels of `fold`, and each folded batch norm becomes the identity: mean 0, var 1,
    scale 1, bias 0. So a model of linen or NNX keeps its structure and its code. If its variables are
    constants of a compiled program, XLA removes the identity. Exactly:

    - The batch norm still divides by sqrt(1 + epsilon). Its scale becomes that, and without a scale the
      kernel and bias of the layer are multiplied by it. The variance is 1.
    - A layer without bias, such as `Conv(use_bias=False)`, cannot take the offset. It stays in the batch
      norm: in its bias, or without one in its mean. A real bias takes no complex offset either.
    - All keep their dtypes, except for a real kernel whose batch norm has a complex scale.

    With pairs=None they are found: `call(variables, x)` is traced, nothing is computed, and a batch norm
    belongs to the layer whose output is its input, with nothing between. Each pair found is printed, and
    each batch norm without a pair. Found are Dense, DenseGeneral, Conv and ConvTranspose of linen, Linear,
    LinearGeneral, Conv and ConvTranspose of NNX, and the batch norms of Flax and jbn. Left out are layers
    and batch norms that run more than once, share weights, or are stacked by `nn.scan` or `nn.vmap`; layers
    whose output goes to a second layer or batch norm; batch norms over other axes; and pairs of which one
    part is inside a `jit` and the other outside.

    The proof: `call` is evaluated on random input like x before and after, at full matrix precision. No
    output may move by more than 1e-5 of the largest one, or 4 epsilons of the coarsest dtype that the layers
    store or compute in. And an output must move by more if a batch norm gets other values: otherwise no
    output depends on the pair, and they prove nothing. Pairs that were found and cannot be proved are printed
    and left out.

    Without `call` each pair is proved by itself: the kernel is contracted with random patches, and batch norm
    follows. That cannot show that a layer's output is used elsewhere too, that epsilon has another value, or
    that the layers have `debias=True`: for these pass what `jbn.tools.debias` returns.

    Args:
      variables: linen variables, `{"params": ..., "batch_stats": ...}`, or an NNX module; not changed. The
        proof needs values, so it cannot run under `jit`.
      pairs: the paths of a layer and of its batch norm, each like "block/Conv_0" or ("block", "Conv_0").
      call: the model in evaluation, such as `lambda variables, x: model.apply(variables, x, train=False)`.
        An NNX module is put into evaluation mode first, and, if there is an x, is itself the default.
      x: an example input of `call`, an array or a tree of them. What floating leaves hold does not matter;
        integers are drawn from the range of a leaf, or, where all are the same, from 0 up.
      epsilon: of the batch norms that `call` does not run; the others have their own.
      axis: as in `fold`, for layers that `call` does not run.

    Returns:
      variables of the same structure, or a new NNX module.

    Raises:
      ValueError: pairs that the model does not have or that do not fit; named pairs whose folding changes the
        outputs, or on which no output depends; a `call` without floating outputs.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jbn.tools
      >>> model, x = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=True)]), jnp.ones((1, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> folded = jbn.tools.fold_variables(variables, call=model.apply, x=x)
      layers_0 -> layers_1
      >>> print(jnp.allclose(model.apply(folded, x), model.apply(variables, x)))
      True

    Reference: Jacob et al. 2018, arXiv 1712.05877, section 3.2.
    """
    check_epsilon(epsilon)
    epsilon = float(epsilon)  # an array would be no static argument of what is compiled
    _check_call(call)
    trees = as_dicts(variables)
    _check_values(variables=trees, x=x)
    if call is None and x is not None and isinstance(variables, nnx.Module):
        call = _call_module
    calls = [] if call is None else trace_calls(call, variables, x)
    model = open_model(variables, trees)
    paths = find_pairs(calls, model) if pairs is None else resolve_pairs(pairs, model)
    static_axis = tuple(axis) if isinstance(axis, Sequence) else axis
    epsilons = {seen.path: float(seen.module.epsilon) for seen in calls if seen.is_norm}
    axes = {seen.path: kernel_axes(seen.module) for seen in calls if not seen.is_norm}
    momenta = {
        seen.path: seen.module.momentum
        for seen in calls
        if seen.is_norm and getattr(seen.module, "debias", False)
    }
    chosen = [
        Pair(a, b, epsilons.get(b, epsilon), axes.get(a, static_axis), momenta.get(b)) for a, b in paths
    ]
    changes = prove(variables, model, chosen, call, x, {seen.y.dtype for seen in calls}, found=pairs is None)
    new: Model = model.template.build(model.write(changes))
    return new


def _check_call(call: Any) -> None:
    """A function to call, or None."""
    if call is not None and not callable(call):
        fix = "For example lambda variables, x: model.apply(variables, x, train=False)."
        raise error("call", describe(call), "a function of variables and x", fix)


def _check_values(**trees: Any) -> None:
    """Arrays with values: what is traced has none, and what is no array has no dtype."""
    for argument, tree in trees.items():
        for value in jax.tree.leaves(tree):
            if isinstance(value, jax.core.Tracer):
                fix = "Call it outside of jit, grad and scan."
                got = f"one with a traced {describe(value)}"
                raise error(argument, got, "values, which the proof needs", fix)
            if not hasattr(value, "dtype"):
                got = f"a tree with {describe(value)}"
                raise error(argument, got, "a tree of arrays", "Convert it: jnp.asarray.")


def _call_module(model: Any, x: Any) -> Any:
    """The call of an NNX module that is given without one."""
    return model(x)
