"""What a call of a model shows: which layer feeds which batch norm.

Names say nothing: `BatchNorm_0` of one model follows `Conv_3`, and in another it stands before it. So the
model is traced once, and a batch norm belongs to the layer whose output, the very same object, is its input.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata
from rich.console import Console

import jbn.linen
import jbn.nnx
from jbn._core.errors import describe, error
from jbn.tools._models import Layer, Path, Variables, path_name, show_path

_LAYERS: tuple[Any, ...] = (
    *(nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose),
    *(nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose),
)
_NORMS: tuple[Any, ...] = (nn.BatchNorm, jbn.linen.BatchNorm, nnx.BatchNorm, jbn.nnx.BatchNorm)

_TRACES = itertools.count()


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


def calls_of(call: Callable[[Any, Any], Any], variables: Variables, x: Any) -> list[Call]:
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


def found_pairs(
    calls: Sequence[Call], layers: Mapping[Path, Any], norms: Mapping[Path, Layer]
) -> list[tuple[Path, Path]]:
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
    times = Counter(call.weights for call in calls)
    pairs = []
    for layer in calls:
        takers = [call for call in calls if call.x is layer.y]
        if layer.is_norm or len(takers) != 1 or not takers[0].is_norm:
            continue
        norm = takers[0]
        once = times[layer.weights] == times[norm.weights] == 1
        if once and _on_output_channels(norm, layer) and _fit(norm, layer, layers, norms):
            pairs.append((layer.path, norm.path))
    console = Console()
    for pair in pairs:
        console.out(" -> ".join(map(show_path, pair)), highlight=False)
    if left := [show_path(path) for path in norms if path not in {norm for _, norm in pairs}]:
        console.out(f"no layer found for: {', '.join(left)}", highlight=False)
    return pairs


def kernel_axes(module: Any) -> tuple[int, ...]:
    """The axes of a layer's kernel that hold its output channels."""
    if isinstance(module, (nn.ConvTranspose, nnx.ConvTranspose)) and module.transpose_kernel:
        return (-2,)
    features = module.features if isinstance(module, nn.Module) else module.out_features
    return tuple(range(-len(features), 0)) if isinstance(features, Sequence) else (-1,)


def _on_output_channels(norm: Call, layer: Call) -> bool:
    """Whether the batch norm's feature axes are the last ones, as many as the layer has output axes."""
    rank, axis = norm.x.ndim, norm.module.axis
    features = {a % rank for a in (axis if isinstance(axis, Sequence) else (axis,))}
    if isinstance(layer.module, nn.DenseGeneral) and layer.module.batch_dims:
        return False  # its bias differs from example to example
    if isinstance(layer.module, nnx.LinearGeneral) and layer.module.batch_axis:
        return False
    return features == set(range(rank - len(kernel_axes(layer.module)), rank))


def _fit(norm: Call, layer: Call, layers: Mapping[Path, Any], norms: Mapping[Path, Layer]) -> bool:
    """Whether both are among the variables, and neither stacked: then they would have an axis more there."""
    if layer.path not in layers or norm.path not in norms:
        return False
    kernel = layers[layer.path]["kernel"]
    features = tuple(kernel.shape[axis] for axis in kernel_axes(layer.module))
    return norms[norm.path].batch_stats["mean"].shape == features


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
    model = evaluating(variables)
    for path, module in list(nnx.iter_modules(model)):
        if _is_known(type(module)):
            layer: Any = module
            layer.__class__ = _recording_class(type(module), path, record)
    return model


def evaluating(model: Any) -> Any:
    """A copy in evaluation mode."""
    copy = nnx.clone(model)
    copy.eval()
    return copy


def _recording_class(kind: Any, path: Any, record: Callable[..., Any]) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return record(path, self, functools.partial(kind.__call__, self), args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})


def named_pairs(pairs: Any, layers: Iterable[Path], norms: Iterable[Path]) -> list[tuple[Path, Path]]:
    """The pairs that the caller named, as paths of the model; each layer and batch norm once."""
    expected = "pairs of a layer and a batch norm"
    example = "For example [('block/Conv_0', 'block/BatchNorm_0')]."
    if not isinstance(pairs, Iterable):
        raise error("pairs", describe(pairs), expected, example)
    found = []
    for pair in pairs:
        parts = pair if isinstance(pair, (tuple, list)) else ()
        if len(parts) != 2 or not all(isinstance(part, (str, tuple, list)) for part in parts):
            raise error("pairs", f"a sequence with {pair!r}", expected, example)
        found.append((_known(pair[0], layers, "layer"), _known(pair[1], norms, "batch norm")))
    times = Counter(path for pair in found for path in pair)
    if twice := [show_path(path) for path, count in times.items() if count > 1]:
        raise error(
            "pairs",
            f"a sequence with {', '.join(twice)} in several pairs",
            "each layer and each batch norm once",
            "A layer takes one batch norm.",
        )
    return found


def _known(given: Any, paths: Iterable[Path], kind: str) -> Path:
    written = given if isinstance(given, str) else path_name(tuple(given))
    known = {path_name(path): path for path in paths}
    if written not in known:
        raise error(
            "pairs",
            f"a sequence with the {kind} {written!r}",
            f"a {kind} of the model: {', '.join(map(show_path, known.values())) or 'it has none'}",
            "Paths are those of the variables; a shared NNX module has the first of its paths.",
        )
    return known[written]
