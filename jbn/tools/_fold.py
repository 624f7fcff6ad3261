"""Folding: batch norm in evaluation is a factor and an offset per channel, which the layer before can take.

`fold` does it to arrays, `fold_variables` to a model, and proves each time that the outputs stayed.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta
from flax.traverse_util import flatten_dict
from jaxtyping import Array
from numpy.lib.array_utils import normalize_axis_tuple

from jbn._batch_norm import batch_norm
from jbn._checks import as_numbers, check_entries, check_settings, error, naming
from jbn._normalize import inverse_deviation
from jbn._types import Axes, BatchStats, Dtype, Params, describe, kept, sharded_like, wide, working
from jbn.tools._find import (
    allowed_move,
    calls_of,
    found_pairs,
    kernel_axes,
    largest_move,
    named_pairs,
    outputs_of,
    random_like,
)
from jbn.tools._trees import Layer, Path, Variables, batch_norms, collections, dotted, rebuilt

Model = TypeVar("Model", bound=Variables)

_FOLD, _FOLD_VARIABLES = "tools.fold", "tools.fold_variables"


class Pair(NamedTuple):
    """A layer and the batch norm that is folded into it."""

    layer: Path
    norm: Path
    epsilon: float
    axis: Axes

    @property
    def name(self) -> str:
        """The pair for people."""
        return f"{dotted(self.layer)} -> {dotted(self.norm)}"


def fold(
    kernel: Array,
    bias: Array | None,
    params: Params | None,
    batch_stats: BatchStats,
    *,
    epsilon: float = 1e-5,
    axis: Axes = -1,
) -> tuple[Array, Array]:
    """Folds batch norm in evaluation into the Dense, DenseGeneral, Conv or ConvTranspose before it.

        kernel' = kernel * factor,  bias' = (bias - mean) * factor + beta
        with factor = gamma / sqrt(var + epsilon)

    The layer with the new kernel and bias computes what the layer and the batch norm computed. `strides`,
    `padding`, `kernel_dilation` and `feature_group_count` change nothing: the output channels are the last
    axis of a kernel, in all layers but a ConvTranspose with `transpose_kernel=True`.

    - Computed in float32 or wider, and rounded once: kernel' has the dtype of kernel.
    - bias' has the dtype of bias, and without one that of kernel: the output dtype of a Flax layer follows
      from both, and stays. A complex mean or beta makes bias' complex.
    - Where var and epsilon are both 0, the factor is 0, as in `jbn.batch_norm`.

    Args:
      kernel: [..., C], or with its output channels where `axis` says.
      bias: [C], or None: the layer has none.
      params: of the batch norm: a mapping with `scale` (gamma), `bias` (beta), either or neither, each [C].
      batch_stats: of the batch norm: a mapping with `mean` and `var` (biased), each [C].
      epsilon: that of the batch norm; Flax's default is 1e-5, and many models set another.
      axis: the axes of kernel that hold the output channels: -1, or -2 for a ConvTranspose with
        `transpose_kernel=True`, or several for a DenseGeneral with several output axes, such as (-2, -1).
        The other arrays have these axes, in the order of kernel.

    Returns:
      kernel' and bias'. Give the layer a bias if it had none.

    Raises:
      ValueError: shapes that do not fit, and arrays that are no floating or complex numbers.

    Example:
      >>> import jax.numpy as jnp, jbn.tools
      >>> kernel, bias = jnp.array([[2.0]]), jnp.array([1.0])
      >>> params = {"scale": jnp.array([0.5]), "bias": jnp.array([-1.0])}
      >>> batch_stats = {"mean": jnp.array([3.0]), "var": jnp.array([4.0])}
      >>> kernel, bias = jbn.tools.fold(kernel, bias, params, batch_stats, epsilon=0.0)
      >>> print(kernel, bias)
      [[0.5]] [-1.5]

    Reference: Jacob et al. 2018, arXiv 1712.05877, section 3.2.
    """
    params = {} if params is None else params
    kernel, axes = _check_fold(kernel, bias, params, batch_stats, epsilon, axis)
    new_kernel, new_bias = _folded(kernel, bias, params, batch_stats, float(epsilon), axes)
    kind = kernel.dtype if bias is None else jnp.asarray(bias).dtype
    return _stored(new_kernel, kernel.dtype), _stored(new_bias, kind)


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
    scale 1, bias 0. So the model keeps its structure and its code. Exactly:

    - The batch norm still divides by sqrt(1 + epsilon). Its scale becomes that, and without a scale the
      kernel and bias of the layer are multiplied by it. The variance is 1.
    - A layer without bias, such as `Conv(use_bias=False)`, cannot take the offset. It stays in the batch
      norm: in its bias, or without one in its mean.

    With pairs=None they are found: `call(variables, x)` is traced, nothing is computed, and a batch norm
    belongs to the layer whose output is its input, with nothing between. Each pair found is printed, and
    each batch norm without one. Found are Dense, DenseGeneral, Conv and ConvTranspose of linen, Linear,
    LinearGeneral, Conv and ConvTranspose of NNX, and the batch norms of Flax and jbn. Left out are layers
    and batch norms that run more than once or share weights, or that `nn.scan` or `nn.vmap` stacks, layers
    whose output a second of them takes, batch norms over other axes, and pairs that `jit` parts.

    The proof: `call` is evaluated on random normal input like x before and after, at full matrix precision.
    No output may move by more than 1e-5 of the largest one, or 4 epsilons of the coarsest dtype that the
    layers store or compute in. Without `call` each pair is proved by itself: the kernel is contracted with
    random patches, and batch norm follows. That cannot show that a layer's output is used elsewhere too, or
    that epsilon is another.

    Args:
      variables: linen variables, `{"params": ..., "batch_stats": ...}`, or an NNX module. Never written. The
        proof needs values: not inside of `jit`.
      pairs: of the paths of a layer and of its batch norm, each like "block/Conv_0" or ("block", "Conv_0").
      call: the model in evaluation, such as `lambda variables, x: model.apply(variables, x, train=False)`.
        An NNX module is put into evaluation mode before, and if there is an x, is itself the default.
      x: an example input of `call`, an array or a tree of them; what floating leaves hold does not matter.
      epsilon: that of the batch norms which `call` did not run; the others know theirs.
      axis: as in `fold`, for layers which `call` did not run.

    Returns:
      variables of the same structure, or a new NNX module.

    Raises:
      ValueError: pairs that the model does not have, that do not fit, or whose folding changes the outputs.

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
    if call is None and x is not None and isinstance(variables, nnx.Module):
        call = _itself
    calls = [] if call is None else calls_of(_FOLD_VARIABLES, call, variables, x)
    layers, norms = _parts(variables)
    if pairs is None:
        paths = found_pairs(_FOLD_VARIABLES, calls, layers, norms)
    else:
        paths = named_pairs(_FOLD_VARIABLES, pairs, layers, norms)
    static = tuple(axis) if isinstance(axis, Sequence) else axis
    epsilons = {seen.path: float(seen.module.epsilon) for seen in calls if seen.is_norm}
    axes = {seen.path: kernel_axes(seen.module) for seen in calls if not seen.is_norm}
    chosen = [Pair(a, b, epsilons.get(b, epsilon), axes.get(a, static)) for a, b in paths]
    new = _folded_model(variables, chosen)
    if chosen:
        outputs = functools.partial(_pair_outputs, chosen) if call is None else outputs_of(call, x)
        _prove(chosen, variables, new, outputs, {seen.y.dtype for seen in calls})
    return new


def _check_fold(
    kernel: Any, bias: Any, params: Any, batch_stats: Any, epsilon: Any, axis: Axes
) -> tuple[Array, tuple[int, ...]]:
    """The kernel as an array and the axes of its output channels, which all other arrays have."""
    for name, value in {"kernel": kernel, "bias": kernel if bias is None else bias}.items():
        array = as_numbers(value)
        if array is None or not jnp.issubdtype(array.dtype, jnp.inexact):
            text = "a floating or complex array"
            raise error(_FOLD, name, describe(value), text, "Fold first, and quantize then.")
    kernel = jnp.asarray(kernel)
    try:
        axes = tuple(sorted(normalize_axis_tuple(axis, kernel.ndim)))
    except (TypeError, ValueError):
        axes = ()
    if not axes:
        raise error(
            _FOLD,
            "axis",
            repr(axis),
            f"one or several different axes of kernel = {describe(kernel)}",
            "Name those with the output channels: -1, or -2 for transpose_kernel=True.",
        )
    check_settings(_FOLD, 0.0, epsilon, None, (kernel,))
    check_entries(_FOLD, "params", params, ("scale", "bias"))
    check_entries(_FOLD, "batch_stats", batch_stats, ("mean", "var", "count", "rows"))
    features = tuple(kernel.shape[a] for a in axes)
    named = {f"params[{name!r}]": value for name, value in params.items()}
    named |= {f"batch_stats[{name!r}]": batch_stats.get(name) for name in ("mean", "var")}
    if bias is not None:
        named["bias"] = bias
    for name, value in named.items():
        if value is None or jnp.shape(value) != features:
            raise error(
                _FOLD,
                name,
                describe(value),
                f"shape {features}, that of axis {axis} of kernel = {describe(kernel)}",
                "Set axis to where the kernel has its output channels; fold stacked layers one by one.",
            )
    return kernel, axes


@functools.partial(jax.jit, static_argnums=(4, 5), inline=True)
def _folded(
    kernel: Array,
    bias: Array | None,
    params: Params,
    batch_stats: BatchStats,
    epsilon: float,
    axes: tuple[int, ...],
) -> tuple[Array, Array]:
    """`fold` before rounding."""
    mean, var = batch_stats["mean"], batch_stats["var"]
    factor = inverse_deviation(var.astype(wide(var.dtype, kernel.dtype)), epsilon)
    if "scale" in params:
        factor = _times(factor, params["scale"])
    offset = _times(-mean if bias is None else _plus(bias, -mean), factor)
    if "bias" in params:
        offset = _plus(offset, params["bias"])
    spread = jnp.expand_dims(factor, tuple(a for a in range(kernel.ndim) if a not in axes))
    return _times(kernel, sharded_like(spread, kernel)), offset


@functools.partial(jax.jit, static_argnums=(2, 3))
def _absorbed(
    layer: Mapping[str, Array], norm: Layer, epsilon: float, axis: Axes
) -> tuple[dict[str, Array], Layer]:
    """The layer with the batch norm in it, and the batch norm as the identity, which keeps what cannot go.

    What the batch norm still multiplies by, step, is 1 but for rounding if there is a scale; it is taken out
    of the layer, so that a bfloat16 scale, which cannot hold sqrt(1 + epsilon), does no harm.
    """
    bias = layer.get("bias")
    kernel, axes = _check_fold(layer["kernel"], bias, norm.params, norm.batch_stats, epsilon, axis)
    params, var = dict(norm.params), jnp.ones_like(norm.batch_stats["var"])
    step = inverse_deviation(var.astype(wide(var.dtype, kernel.dtype)), epsilon)
    if "scale" in params:
        params["scale"] = jnp.full_like(params["scale"], math.sqrt(1 + epsilon))
        step = _times(step, params["scale"])
    scale = norm.params.get("scale", jnp.ones_like(step))
    inner = {"scale": _times(scale, 1 / step)}
    if "bias" in params:
        inner["bias"] = _times(params["bias"], 1 / step)
    kernel, offset = _folded(kernel, bias, inner, norm.batch_stats, epsilon, axes)
    new = {"kernel": _stored(kernel, layer["kernel"].dtype)}
    if bias is not None:
        new["bias"] = _stored(offset, bias.dtype)
        offset = jnp.zeros_like(offset)
    if "bias" in params:
        params["bias"] = _stored(_times(offset, step), params["bias"].dtype)
        offset = jnp.zeros_like(offset)
    mean = _stored(jnp.zeros_like(offset) - offset, norm.batch_stats["mean"].dtype)
    return new, Layer(params, {**norm.batch_stats, "mean": mean, "var": var})


def _folded_model(variables: Model, pairs: Sequence[Pair]) -> Model:
    """The model with these pairs folded; values in boxes, such as `nn.Partitioned`, stay in them."""
    boxed = collections(_FOLD_VARIABLES, variables)
    trees = meta.unbox(boxed)
    layers, norms = _parts(variables)
    for pair in pairs:
        with naming(f"jbn.{_FOLD_VARIABLES} {pair.name!r}"):
            layer, norm = _absorbed(layers[pair.layer], norms[pair.norm], pair.epsilon, pair.axis)
        _put(trees["params"], pair.layer, layer)
        _put(trees["params"], pair.norm, norm.params)
        _put(trees["batch_stats"], pair.norm, norm.batch_stats)
    names = ("params", "batch_stats")
    new: Model = rebuilt(variables, **{name: meta.replace_boxed(boxed[name], trees[name]) for name in names})
    return new


def _put(tree: Any, path: Path, values: Mapping[str, Array]) -> None:
    for name, value in values.items():
        functools.reduce(lambda node, key: node[key], path, tree)[name] = value


def _parts(variables: Variables) -> tuple[dict[Path, dict[str, Array]], dict[Path, Layer]]:
    """By path, the kernel and bias of everything with a kernel, and every batch norm."""
    trees = meta.unbox(collections(_FOLD_VARIABLES, variables))
    params = flatten_dict(trees.get("params", {}))
    layers = {
        path[:-1]: {
            name: params[*path[:-1], name] for name in ("kernel", "bias") if (*path[:-1], name) in params
        }
        for path in params
        if path[-1] == "kernel"
    }
    return layers, batch_norms(_FOLD_VARIABLES, trees)


def _itself(model: Any, x: Any) -> Any:
    return model(x)


def _prove(
    pairs: Sequence[Pair], old: Model, new: Model, outputs: Callable[[Model], list[Array]], dtypes: set[Dtype]
) -> None:
    """No output has moved; else the error names the pairs to blame: those that move it when folded alone."""
    before = outputs(old)
    layers, norms = _parts(old)
    stored = [layers[pair.layer] for pair in pairs], [norms[pair.norm] for pair in pairs]
    allowed = allowed_move({leaf.dtype for leaf in jax.tree.leaves((before, stored))} | dtypes)
    moved = largest_move(before, outputs(new))
    if moved <= allowed:
        return
    alone = {pair.name: largest_move(before, outputs(_folded_model(old, [pair]))) for pair in pairs}
    blamed = [name for name, moved in alone.items() if not moved <= allowed] or list(alone)
    raise error(
        _FOLD_VARIABLES,
        "pairs",
        f"a sequence with {', '.join(blamed)}, which moves outputs by {moved:.1e} of the largest",
        f"at most {allowed:.1e}",
        "Leave the pair out: something else uses the layer's output too, or stands between it and the batch "
        "norm, or its epsilon is another, or the new values do not fit their dtype.",
    )


def _pair_outputs(pairs: Sequence[Pair], model: Variables) -> list[Array]:
    """Each layer and batch norm by itself, on random patches."""
    layers, norms = _parts(model)
    with jax.default_matmul_precision("highest"):
        return [_through(layers[pair.layer], norms[pair.norm], pair.epsilon, pair.axis) for pair in pairs]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _through(layer: Mapping[str, Array], norm: Layer, epsilon: float, axis: Axes) -> Array:
    """The kernel contracted with random patches, in a wide dtype, the bias, and the batch norm."""
    kernel = layer["kernel"].astype(working(layer["kernel"].dtype))
    features = normalize_axis_tuple(axis, kernel.ndim)
    others = tuple(a for a in range(kernel.ndim) if a not in features)
    patches = jnp.asarray(
        random_like(jax.ShapeDtypeStruct((16, *(kernel.shape[a] for a in others)), kernel.dtype))
    )
    y = jnp.tensordot(patches, kernel, axes=(tuple(range(1, patches.ndim)), others))
    if "bias" in layer:
        y = _plus(y, layer["bias"][None])
    feature_axes = tuple(range(1, y.ndim))
    stats = kept(norm.batch_stats, y)
    y, _ = batch_norm(norm.params, stats, y, use_running_average=True, epsilon=epsilon, axis=feature_axes)
    return y


def _times(a: Array, b: Array) -> Array:
    kind = working(a.dtype, b.dtype)
    return a.astype(kind) * b.astype(kind)


def _plus(a: Array, b: Array) -> Array:
    kind = working(a.dtype, b.dtype)
    return a.astype(kind) + b.astype(kind)


def _stored(value: Array, dtype: Dtype) -> Array:
    """The value in that dtype; a complex one stays complex."""
    widens = jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating)
    return value if widens else value.astype(dtype)
