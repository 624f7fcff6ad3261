"""The layers and batch norms of a model, and which layer feeds which batch norm: found, or named.

Names say nothing: `BatchNorm_0` of one model follows `Conv_3`, and in another it stands before it. So the
model is traced once, and a batch norm belongs to the layer whose output, the very same object, is its input.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array
from rich.console import Console

import jbn.linen
import jbn.nnx
from jbn._core.errors import describe, error, join_names
from jbn._core.types import Axes
from jbn.tools._models import (
    Layer,
    Path,
    Template,
    Variables,
    batch_norms_in,
    flat_collections,
    open_template,
    path_name,
    show_path,
)

_LAYERS: tuple[Any, ...] = (
    *(nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose),
    *(nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose),
)
_NORMS: tuple[Any, ...] = (nn.BatchNorm, jbn.linen.BatchNorm, nnx.BatchNorm, jbn.nnx.BatchNorm)

_TRACES = itertools.count()


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


class PairArrays(NamedTuple):
    """What the model holds of a pair: kernel and bias of the layer, and the batch norm."""

    layer: dict[str, Array]
    norm: Layer


Changes: TypeAlias = Mapping[Pair, PairArrays]
"""Pairs that hold other arrays than those of the model."""


class OpenedModel(NamedTuple):
    """A model opened once: the layers and batch norms in it, and what writes it with other values of them."""

    layers: dict[Path, dict[str, Array]]
    """Kernel and bias of everything with a kernel."""
    norms: dict[Path, Layer]
    template: Template

    def arrays(self, pair: Pair) -> PairArrays:
        """What the model holds of this pair."""
        return PairArrays(self.layers[pair.layer], self.norms[pair.norm])

    def write(self, changes: Changes) -> Any:
        """The collections of the model with these changes."""
        params: dict[Path, dict[str, Array]] = {}
        stats = {}
        for pair, arrays in changes.items():
            params[pair.layer] = arrays.layer
            params[pair.norm], stats[pair.norm] = arrays.norm
        return self.template.fill(params=params, batch_stats=stats)


def open_model(variables: Variables, trees: Mapping[str, Any]) -> OpenedModel:
    """The model, opened; `trees` are its collections as nested dicts."""
    flat = flat_collections(trees)
    params = flat.get("params", {})
    layers = {
        path[:-1]: {
            name: params[*path[:-1], name] for name in ("kernel", "bias") if (*path[:-1], name) in params
        }
        for path in params
        if path[-1] == "kernel"
    }
    return OpenedModel(layers, batch_norms_in(flat), open_template(variables))


class Call(NamedTuple):
    """One call of a layer or of a batch norm: `weights` is what calls with the same parameters share."""

    path: Path
    weights: Hashable
    module: Any
    x: Any
    y: Any

    @property
    def is_norm(self) -> bool:
        """Whether a batch norm was called, and not a layer."""
        return isinstance(self.module, _NORMS)


def trace_calls(call: Callable[[Any, Any], Any], variables: Variables, x: Any) -> list[Call]:
    """What `call(variables, x)` runs, in order: every layer that could be folded into, and every batch norm.

    A subclass counts if it has the `__call__` of its base: any other could do anything.
    """
    if x is None:
        fix = "One example with its batch axis will do."
        raise error("x", "None", "an example input of call", fix)
    calls: list[Call] = []
    running = False

    def record(path: Path, module: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        nonlocal running
        if running:  # a layer that runs as another one, as in `replace_batch_norm`: one call, not two
            return run(*args, **kwargs)
        running = True
        try:
            y = run(*args, **kwargs)
        finally:
            running = False
        given = args[0] if args else next(iter(kwargs.values()), None)
        calls.append(Call(path, _weights(path, module), module, given, y))
        return y

    if isinstance(variables, nnx.Module):
        graph, state = nnx.split(_recording(variables, record))
        jax.eval_shape(lambda state, x: call(nnx.merge(graph, state), x), state, x)
        return calls

    def intercept(run: Callable[..., Any], args: Any, kwargs: Any, at: nn.module.InterceptorContext) -> Any:
        if at.method_name != "__call__" or not _is_known(type(at.module)):
            return run(*args, **kwargs)
        return record(at.module.path, at.module, run, args, kwargs)

    # What jax.jit has traced before it would not trace again, were there no metadata that it has not seen.
    with nn.intercept_methods(intercept), set_xla_metadata(jbn_find=str(next(_TRACES))):
        jax.eval_shape(call, variables, x)
    return calls


def find_pairs(calls: Sequence[Call], model: OpenedModel) -> list[tuple[Path, Path]]:
    """Each layer with the batch norm after it, where nothing that can be seen speaks against folding.

    Prints them, for the caller to check, and the batch norms that are left.
    """
    if not any(call.is_norm for call in calls):
        raise error(
            "pairs",
            "None, and no batch norm was seen to run",
            "pairs, or the call of a model and its x",
            "Pass call=lambda variables, x: model.apply(variables, x, train=False) and an example x, or "
            "pairs=[('Conv_0', 'BatchNorm_0')].",
        )
    runs = Counter(call.weights for call in calls)
    pairs = []
    for layer in calls:
        consumers = [call for call in calls if call.x is layer.y]
        if layer.is_norm or len(consumers) != 1 or not consumers[0].is_norm:
            continue
        norm = consumers[0]
        once = runs[layer.weights] == runs[norm.weights] == 1
        if once and _normalizes_outputs(norm, layer) and _shapes_match(norm, layer, model):
            pairs.append((layer.path, norm.path))
    console = Console()
    for pair in pairs:
        console.out(" -> ".join(map(show_path, pair)), highlight=False)
    if left := [show_path(path) for path in model.norms if path not in {norm for _, norm in pairs}]:
        console.out(f"no layer found for: {', '.join(left)}", highlight=False)
    return pairs


def kernel_axes(module: Any) -> tuple[int, ...]:
    """The axes of a layer's kernel that hold its output channels."""
    if isinstance(module, (nn.ConvTranspose, nnx.ConvTranspose)) and module.transpose_kernel:
        return (-2,)
    features = module.features if isinstance(module, nn.Module) else module.out_features
    return tuple(range(-len(features), 0)) if isinstance(features, Sequence) else (-1,)


def _normalizes_outputs(norm: Call, layer: Call) -> bool:
    """Whether the batch norm's feature axes are the last ones, as many as the layer has output axes."""
    rank, axis = norm.x.ndim, norm.module.axis
    features = {a % rank for a in (axis if isinstance(axis, Sequence) else (axis,))}
    if isinstance(layer.module, nn.DenseGeneral) and layer.module.batch_dims:
        return False  # its bias differs from example to example
    if isinstance(layer.module, nnx.LinearGeneral) and layer.module.batch_axis:
        return False
    return features == set(range(rank - len(kernel_axes(layer.module)), rank))


def _shapes_match(norm: Call, layer: Call, model: OpenedModel) -> bool:
    """Whether both are among the variables, and neither stacked: then they would have an axis more there."""
    if layer.path not in model.layers or norm.path not in model.norms:
        return False
    kernel = model.layers[layer.path]["kernel"]
    features = tuple(kernel.shape[axis] for axis in kernel_axes(layer.module))
    return model.norms[norm.path].batch_stats["mean"].shape == features


def _is_known(kind: Any) -> bool:
    return any(issubclass(kind, known) and kind.__call__ is known.__call__ for known in _LAYERS + _NORMS)


def _weights(path: Path, module: Any) -> Hashable:
    """NNX modules may share a variable; linen modules share parameters only by being one module."""
    if isinstance(module, nn.Module):
        return path
    return id(getattr(module, "mean" if isinstance(module, _NORMS) else "kernel"))


def _recording(variables: nnx.Module, record: Callable[..., Any]) -> Any:
    """A copy of the model, in evaluation mode, whose layers record their calls.

    The class alone is changed, as in `jbn.nnx.replace_batch_norm`: a shared layer stays one object.
    """
    model = eval_copy(variables)
    for path, module in list(nnx.iter_modules(model)):
        if _is_known(type(module)):
            layer: Any = module
            layer.__class__ = _recording_class(type(module), path, record)
    return model


def eval_copy(model: Any) -> Any:
    """A copy in evaluation mode."""
    copy = nnx.clone(model)
    copy.eval()
    return copy


def _recording_class(kind: Any, path: Any, record: Callable[..., Any]) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return record(path, self, functools.partial(kind.__call__, self), args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})


def resolve_pairs(pairs: Any, model: OpenedModel) -> list[tuple[Path, Path]]:
    """The pairs that the caller named, as paths of the model; each layer and batch norm once."""
    expected = "pairs of a layer and a batch norm"
    example = "For example [('block/Conv_0', 'block/BatchNorm_0')]."
    if not isinstance(pairs, Iterable):
        raise error("pairs", describe(pairs), expected, example)
    found = []
    for pair in pairs:
        parts = pair if isinstance(pair, (tuple, list)) else ()
        if len(parts) != 2 or not all(isinstance(part, (str, tuple, list)) for part in parts):
            raise error("pairs", f"a sequence with {describe(pair)}", expected, example)
        layer, norm = pair
        found.append((_find_path(layer, model.layers, "layer"), _find_path(norm, model.norms, "batch norm")))
    counts = Counter(path for pair in found for path in pair)
    if twice := [show_path(path) for path, count in counts.items() if count > 1]:
        raise error(
            "pairs",
            f"a sequence with {join_names(twice)} in several pairs",
            "each layer and each batch norm once",
            "A layer takes one batch norm.",
        )
    return found


def _find_path(given: Any, paths: Iterable[Path], kind: str) -> Path:
    """The path of a layer or of a batch norm that the caller means, as text or as a tuple."""
    written = given if isinstance(given, str) else path_name(tuple(given))
    known = {path_name(path): path for path in paths}
    if written not in known:
        raise error(
            "pairs",
            f"a sequence with the {kind} {written!r}",
            f"a {kind} of the model: {join_names(map(show_path, known.values())) or 'it has none'}",
            "Paths are those of the variables; a shared NNX module has the first of its paths.",
        )
    return known[written]
