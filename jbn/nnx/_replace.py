"""Models of NNX as they are: batch norms that keep moments, and ours in the place of Flax's."""

import inspect
from collections.abc import Iterable
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from jbn._core.errors import error, join_names, public, warn_user
from jbn._core.layer_filter import Where, check_where, matches, settings_of, warn_of_settings
from jbn._core.moments import Moments
from jbn._core.options import counters
from jbn.nnx._layer import BatchMoments, BatchNorm, as_attribute

Model = TypeVar("Model", bound=nnx.Module)

# Arguments of the layer that are about its variables, which a replaced layer has already.
_VARIABLE_ARGUMENTS = {"self", "num_features", "rngs", "param_dtype", "use_bias", "use_scale"} | {
    f"{name}_{kind}" for name in ("bias", "scale", "mean", "var") for kind in ("init", "metadata")
}
_SETTINGS = {
    name: parameter.default
    for name, parameter in inspect.signature(BatchNorm.__init__).parameters.items()
    if name not in _VARIABLE_ARGUMENTS
}
_USUAL = (nnx.BatchNorm, BatchNorm)
_COMPUTING = nnx.Not(nnx.Any(nnx.RngState, nnx.Intermediate, nnx.Perturbation))
"""Variables that a layer may compute y with; the others are what tools put into any module."""
_VARIABLES = ("mean", "var", "scale", "bias")
_COUNTERS = ("count", "rows", "batch_moments")


def keep_batch_moments(model: nnx.Module, keep: bool = True) -> None:
    """Gives every batch norm of a model a variable for the moments of its batches, with no rows in it yet.

    Args:
      model: its layers of the class `jbn.nnx.BatchNorm` are changed in place.
      keep: False takes the variables away again.

    Example:
      >>> import jax.numpy as jnp, jbn.nnx
      >>> from flax import nnx
      >>> layer = jbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> jbn.nnx.keep_batch_moments(layer)
      >>> _ = layer(jnp.array([[1.0], [3.0]])), layer(jnp.array([[5.0]]).repeat(2, 0))
      >>> print(layer.batch_moments.get_value().mean)
      [3.5]
    """
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, BatchNorm):
            mean, zero = jnp.zeros_like(layer.mean[...]), jnp.zeros_like(layer.var[...])
            layer.batch_moments = nnx.data(BatchMoments(Moments(zero, mean, zero)) if keep else None)


@public
def replace_batch_norm(
    model: Model, where: Where = None, *, classes: tuple[type[nnx.Module], ...] = (), **overrides: Any
) -> Model:
    """Makes every `flax.nnx.BatchNorm` of a model a `jbn.nnx.BatchNorm`, in place.

    Models that somebody else wrote get accurate, masked or synchronized batch norm with no edit. The layers
    are changed in place, wherever the model holds them, and keep their variables, modes and settings, except
    for the overrides. Layers that are `jbn.nnx.BatchNorm` already get the overrides too. Subclasses, and all
    other layers, are left alone.

    Args:
      model: any NNX module, a single batch norm included; it is changed.
      where: which layers: a glob on their path, such as `"backbone/*"`, in which `*` crosses `/`, or a
        predicate of the path; None: all. A layer that is held in several places has the first of its paths.
      classes: further classes of modules to replace: a model's own copy of Flax's layer, with its variables
        and no others, and called as it is or with less. Settings that have a name of ours are taken over,
        whether they are attributes of the layer or of its class. Their subclasses are left alone.
      **overrides: attributes of `jbn.nnx.BatchNorm` that get these values in the layers.

    Returns:
      The model that was given.

    Raises:
      ValueError: an override that is no attribute of the layer; a `where` or `classes` of a wrong kind, a
        class with other variables, or that is called with other arguments, or in another order, or has
        another mode by default. The model is then as it was.

    Warns:
      UserWarning: the model has no batch norm that `where` and `classes` select; settings of replaced classes
        under names that ours does not have, such as `eps`.

    Example:
      >>> import jax.numpy as jnp, jbn.nnx
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(1)))
      >>> model = jbn.nnx.replace_batch_norm(model, axis_name="data")
      >>> type(model.layers[1]) is jbn.nnx.BatchNorm, model.layers[1].axis_name
      (True, 'data')
    """
    if unknown := sorted(set(overrides) - set(_SETTINGS)):
        raise error(
            "overrides",
            join_names(unknown),
            f"settings of jbn.nnx.BatchNorm ({', '.join(_SETTINGS)})",
            "Check the spelling.",
        )
    check_where(where, classes, nnx.Module, BatchNorm)
    kinds = (*_USUAL, *classes)
    modules = [
        module
        for path, module in nnx.iter_modules(model)
        if type(module) in kinds and matches(where, "/".join(map(str, path)))
    ]
    if not modules:
        ran = sorted({type(module).__name__ for _, module in nnx.iter_modules(model)})
        warn_user(
            f"jbn.nnx.replace_batch_norm: the model has modules of {join_names(ran)}, and none is a batch "
            "norm to replace. Name further classes by classes=(TheirBatchNorm,), and look at where=."
        )
    if counters(overrides.get("momentum", 0.0), overrides.get("debias", False)) and any(
        getattr(module, "count", None) is None for module in modules
    ):
        raise error(
            "overrides",
            "momentum=None or debias=True",
            "layers that have counted their updates from the first one",
            "Make the model with jbn.nnx.BatchNorm and this option, and load its variables.",
        )
    for module in modules:
        if type(module) not in _USUAL:
            _check_variables(module)
    warn_of_settings("jbn.nnx.replace_batch_norm", _unknown_settings(modules))
    for module in modules:
        if type(module) is not BatchNorm:
            become_ours(module)
        for name, value in overrides.items():
            setattr(module, name, as_attribute(value))
    return model


def become_ours(layer: Any) -> None:
    """The class alone is changed: wherever the layer is held, and by however many, it stays one object."""
    # Also values in the body of the class, which is theirs no longer afterwards.
    settings = {name: getattr(layer, name, default) for name, default in _SETTINGS.items()}
    features = getattr(layer, "num_features", None)
    layer.__class__ = BatchNorm
    for name in _COUNTERS:
        setattr(layer, name, nnx.data(getattr(layer, name, None)))
    for name, value in settings.items():
        setattr(layer, name, as_attribute(value))
    layer.num_features = layer.mean.get_value().shape[-1] if features is None else features


def _check_variables(module: nnx.Module) -> None:
    """Those of Flax's layer, before any layer is changed; another name of scale would be lost silently."""
    held = {name: getattr(module, name, ()) for name in _VARIABLES}
    wrong = [
        name
        for name, value in held.items()
        if not isinstance(value, nnx.Variable) and (value is not None or name in ("mean", "var"))
    ]
    known = {*_VARIABLES, *(_COUNTERS if isinstance(module, BatchNorm) else ()), *_SETTINGS}
    entries = nnx.to_flat_state(nnx.state(module, _COMPUTING))
    other = ["/".join(map(str, path)) for path, _ in entries if path[0] not in known]
    if wrong or other:
        found = [f"has no variable {', '.join(wrong)}"] if wrong else []
        found += [f"has the variables {join_names(other)}"] if other else []
        raise error(
            "classes",
            f"one with {type(module).__name__}, which {' and '.join(found)}",
            "classes with the variables mean, var, scale and bias, the last two None where a layer has none, "
            "and no others",
            "Give them these names in the class.",
        )


def _unknown_settings(modules: Iterable[nnx.Module]) -> dict[str, set[str]]:
    """Of each class, the attributes that have no name of ours and are no variables."""
    known = {*_SETTINGS, *_VARIABLE_ARGUMENTS, *_VARIABLES, *_COUNTERS}
    unknown = {}
    for module in modules:
        names = settings_of(type(module), nnx.Module) | {
            name
            for name, value in vars(module).items()
            if not (name.startswith("_") or isinstance(value, nnx.Variable))
        }
        if type(module) not in _USUAL and (left := names - known):
            unknown[type(module).__name__] = left
    return unknown
