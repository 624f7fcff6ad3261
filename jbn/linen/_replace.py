"""Models of linen as they are: ours in the place of Flax's batch norms."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental.xla_metadata import set_xla_metadata

from jbn._core.errors import error, join_names, named_errors, warn_user
from jbn._core.layer_filter import Where, check_where, matches, settings_of, warn_of_settings
from jbn._core.moments import Moments
from jbn.linen._layer import ONLY_TRAINING_MOMENTS, BatchNorm


@dataclasses.dataclass(frozen=True)
class _Replacement:
    """What one context replaces, and by what; and what it met."""

    where: Where = None
    classes: tuple[type[nn.Module], ...] = ()
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    ran: dict[str, bool] = dataclasses.field(default_factory=dict)
    """The classes of modules that ran, and whether one of them was meant."""
    left_out: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    """The settings of the classes that were replaced, as far as ours does not have them."""

    def key(self) -> str:
        """What it shares with replacements that are the same to a trace, and with no others."""
        overrides = [part for item in sorted(self.overrides.items()) for part in item]
        return " ".join(map(_key, (self.where, *self.classes, *overrides)))

    def applies_to(self, layer: nn.Module) -> bool:
        known = (nn.BatchNorm, BatchNorm, *self.classes)
        meant = type(layer) in known and matches(self.where, "/".join(layer.path))
        name = type(layer).__name__
        self.ran[name] = self.ran.get(name, False) or meant
        if meant and (unknown := _settings(type(layer)) - _fields(BatchNorm)):
            self.left_out[name] = unknown
        return meant


_ACTIVE: ContextVar[tuple[_Replacement, ...]] = ContextVar("active", default=())


_KEPT: dict[int, Any] = {}
"""Functions and classes that are in keys, by their ids: while they live, no other object has these."""

_TRACERS = itertools.count()


def _key(value: Any) -> str:
    """A text that is the same for two values only if they are the same to a trace."""
    if isinstance(value, jax.core.Tracer):
        return f"tracer {next(_TRACERS)}"  # of this trace alone
    if isinstance(value, (jax.Array, np.ndarray)):
        array = np.asarray(value)
        return f"{array.dtype}{array.shape}{array.tobytes().hex()}"
    if callable(value):
        _KEPT[id(value)] = value
        return f"{value!r} {id(value)}"
    leaves, structure = jax.tree.flatten(value)
    if jax.tree_util.treedef_is_leaf(structure):
        return repr(value)
    return f"{structure}({', '.join(map(_key, leaves))})"


class _StandIn(BatchNorm):
    """In the place of another layer, which captures the intermediates of the call that it got."""

    @nn.nowrap
    def sow(self, *args: Any, **kwargs: Any) -> bool:
        return False


@contextlib.contextmanager
def replace_batch_norm(
    where: Where = None, *, classes: tuple[type[nn.Module], ...] = (), **overrides: Any
) -> Iterator[None]:
    """Makes every `flax.linen.BatchNorm` that is applied inside run as `jbn.linen.BatchNorm`.

    Models that somebody else wrote get accurate, masked or synchronized batch norm with no edit. Parameters,
    statistics, modes and settings stay as they are, except for the overrides, which reach layers that are
    `jbn.linen.BatchNorm` already too; an override of `use_running_average` has precedence over what the
    model says in its calls. Subclasses of these layers, and all others, are left alone. Contexts nest, inner
    overrides first, and hold for one thread.

    What `jax.jit` has compiled outside is traced again inside, once for each set of overrides.

    Args:
      where: which layers: a glob on their path, such as `"backbone/*"`, in which `*` crosses `/`, or a
        predicate of the path; None: all.
      classes: further classes of modules to replace: a model's own copy of Flax's layer, with its variables
        and no others, and called as it is or with less. Settings that have a name of ours are taken over,
        whether they are fields or values in the body of the class. Their subclasses are left alone.
      **overrides: fields of `jbn.linen.BatchNorm` that get these values in the layers.

    Returns:
      A context manager.

    Raises:
      ValueError: an override that is no field of the layer; a `where` or `classes` of a wrong kind, a class
        that is called with other arguments, or in another order, or has another mode by default; when it is
        applied, a layer with other entries in `params` or `batch_stats`.

    Warns:
      UserWarning: at the end, of settings of replaced classes under names that ours does not have, such as
        `eps`; and where modules ran inside, and none of them was a batch norm to replace. Modules in a
        function that `jax.jit` has compiled already are not seen: where all batch norms are in such a
        function, and other modules run outside of it, the second warning is wrong.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jbn.linen
      >>> model, x = nn.BatchNorm(use_running_average=False), jnp.array([[1.0], [3.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> with jbn.linen.replace_batch_norm(momentum=0.5):
      ...     y, new = model.apply(variables, x, mutable=["batch_stats"])
      >>> print(new["batch_stats"]["mean"])
      [1.]
    """
    with named_errors("jbn.linen.replace_batch_norm"):
        _check_overrides(overrides)
        check_where(where, classes, nn.Module, BatchNorm)
    replacement = _Replacement(where, tuple(classes), overrides)
    with _replacing(replacement):
        yield
    warn_of_settings("jbn.linen.replace_batch_norm", replacement.left_out)
    if replacement.ran and not any(replacement.ran.values()):
        ran = join_names(sorted(replacement.ran))
        warn_user(
            f"jbn.linen.replace_batch_norm: modules of {ran} ran, and none was a batch "
            "norm to replace. Name further classes by classes=(TheirBatchNorm,), and look at where=."
        )


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    """Fields of our layer."""
    fields = _fields(BatchNorm)
    if unknown := sorted(set(overrides) - fields):
        raise error(
            "overrides",
            join_names(unknown),
            f"fields of jbn.linen.BatchNorm ({', '.join(sorted(fields))})",
            "Check the spelling.",
        )


@contextlib.contextmanager
def only_training_moments() -> Iterator[tuple[list[str], dict[tuple[str | int, ...], str]]]:
    """`replace_batch_norm()` in which layers leave moments in training mode only, as recalibration needs.

    They leave them in `batch_stats`, as `moments` beside `mean`: lifted transforms need not know of another
    collection, and `nn.scan` that carries the statistics over time has the place from the start. The list
    that comes has the names of what got places inside; `with_empty_moments` puts them there before. The dict
    has the classes, by path, of other batch norms that ran: subclasses of Flax's, or a model's own copies.
    """
    placed: list[str] = []
    others: dict[tuple[str | int, ...], str] = {}

    def place(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        scope: Any = context.module.scope
        if scope is not None and scope.parent is None and scope.is_mutable_collection("batch_stats"):
            for name, places in _empty_moments(scope.variables().get("batch_stats", {})).items():
                scope.put_variable("batch_stats", name, places)
                placed.append(name)
        held = {} if scope is None else scope.variables().get("batch_stats", {})
        if {"mean", "var"} <= set(held) and not isinstance(context.module, BatchNorm):
            others[context.module.path] = type(context.module).__name__
        return call(*args, **kwargs)

    token = ONLY_TRAINING_MOMENTS.set(True)
    again = set_xla_metadata(jbn_training_moments="alone")
    try:
        with _replacing(_Replacement()), nn.intercept_methods(place), again:
            yield placed, others
    finally:
        ONLY_TRAINING_MOMENTS.reset(token)


def with_empty_moments(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of linen with places for moments in them."""
    stats = unfreeze(variables["batch_stats"])
    both = unflatten_dict(flatten_dict(stats) | flatten_dict(_empty_moments(stats)))
    return {**variables, "batch_stats": both}


def _empty_moments(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Moments of no rows for every batch norm that has none yet, as a tree of their places."""
    below = {name: _empty_moments(tree) for name, tree in stats.items() if isinstance(tree, Mapping)}
    places: dict[str, Any] = {name: tree for name, tree in below.items() if tree}
    if {"mean", "var"} <= set(stats) and "moments" not in stats:
        mean, var = (meta.unbox(stats[name]) for name in ("mean", "var"))
        # As wide as any moments can be, which a scan's carry has to be from its first step.
        zero = jnp.zeros(var.shape, float)
        kind = jnp.promote_types(mean.dtype, zero.dtype)
        places["moments"] = Moments(zero, jnp.zeros(mean.shape, kind), zero)
    return places


@contextlib.contextmanager
def _replacing(replacement: _Replacement) -> Iterator[None]:
    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        layer = context.module
        if context.method_name != "__call__" or isinstance(layer, _StandIn):
            return call(*args, **kwargs)
        meant = [each for each in _ACTIVE.get() if each.applies_to(layer)]
        overrides = {name: value for each in meant for name, value in each.overrides.items()}
        if not meant or (type(layer) is BatchNorm and not overrides):
            return call(*args, **kwargs)
        _check_entries(layer)
        settings = {name: getattr(layer, name) for name in _fields(BatchNorm) if hasattr(layer, name)}
        scope: Any = layer.scope  # ours has its variables where the other has them
        ours = _StandIn(**(settings | overrides), parent=scope)
        if "use_running_average" in overrides:
            args = (*args[:1], *(None for _ in args[1:2]), *args[2:])
            kwargs = {name: value for name, value in kwargs.items() if name != "use_running_average"}
        return ours(*args, **kwargs)

    token = _ACTIVE.set((*_ACTIVE.get(), replacement))
    # Metadata is part of the key by which JAX finds what it has traced, replacements must be too.
    traced_again = set_xla_metadata(jbn_replace_batch_norm=" / ".join(each.key() for each in _ACTIVE.get()))
    try:
        with nn.intercept_methods(intercept), traced_again:
            yield
    finally:
        _ACTIVE.reset(token)


def _check_entries(layer: nn.Module) -> None:
    """Of a class that is not Flax's: with others than ours they would be lost silently."""
    ours = {"params": {"scale", "bias"}, "batch_stats": {"mean", "var", "count", "rows", "moments"}}
    other = [
        f"{collection}[{name!r}]"
        for collection, known in ours.items()
        for name in (layer.variables if layer.scope else {}).get(collection, {})
        if name not in known
    ]
    if other and type(layer) is not nn.BatchNorm:
        path = repr("/".join(layer.path)) if layer.path else ""
        with named_errors("jbn.linen.replace_batch_norm", layer=path):
            raise error(
                "classes",
                f"one with {type(layer).__name__}, which has {join_names(other)}",
                "classes with at most scale and bias in params, and mean and var in batch_stats",
                "Give them these names in the class, or leave it out.",
            )


def _settings(layer: type[nn.Module]) -> set[str]:
    """Its fields, and other values in its body."""
    return _fields(layer) | (settings_of(layer, nn.Module) - {"parent", "name", "scope"})


def _fields(layer: type[nn.Module]) -> set[str]:
    """The settings of a layer, without what says where it is."""
    return {field.name for field in dataclasses.fields(layer)} - {"parent", "name"}
