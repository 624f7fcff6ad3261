"""Models of NNX as they are: batch norms that keep moments, and ours in the place of Flax's."""

import inspect
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from jbn._core.errors import error, names_errors, warn_user
from jbn._core.layer_filter import Where, check_where, matches
from jbn._core.moments import Moments
from jbn._core.options import counters
from jbn.nnx._layer import BatchMoments, BatchNorm, as_attribute

Model = TypeVar("Model", bound=nnx.Module)

# Arguments of the layer that are about its variables, which a replaced layer has already.
_OF_VARIABLES = {"self", "num_features", "rngs", "param_dtype", "use_bias", "use_scale"} | {
    f"{name}_{kind}" for name in ("bias", "scale", "mean", "var") for kind in ("init", "metadata")
}
_SETTINGS = {
    name: parameter.default
    for name, parameter in inspect.signature(BatchNorm.__init__).parameters.items()
    if name not in _OF_VARIABLES
}
_OWN = set(_SETTINGS) - set(inspect.signature(nnx.BatchNorm.__init__).parameters)


@names_errors
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


@names_errors
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
        and the arguments of its call, and those of its attributes that have a name of ours. Their subclasses
        are left alone.
      **overrides: attributes of `jbn.nnx.BatchNorm` that get these values in the layers.

    Returns:
      The model that was given.

    Raises:
      ValueError: an override that is no attribute of the layer; a `where` or `classes` of a wrong kind, a
        class with other variables, or that is called with other arguments.

    Warns:
      UserWarning: the model has no batch norm that `where` and `classes` select.

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
            ", ".join(unknown),
            f"settings of jbn.nnx.BatchNorm ({', '.join(_SETTINGS)})",
            "Check the spelling.",
        )
    check_where(where, classes, nnx.Module, BatchNorm)
    kinds = (nnx.BatchNorm, BatchNorm, *classes)
    modules = [
        module
        for path, module in nnx.iter_modules(model)
        if type(module) in kinds and matches(where, "/".join(map(str, path)))
    ]
    if not modules:
        ran = sorted({type(module).__name__ for _, module in nnx.iter_modules(model)})
        warn_user(
            f"jbn.nnx.replace_batch_norm: the model has modules of {', '.join(ran)}, and none is a batch "
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
        _check_variables(module)
    for module in modules:
        if type(module) is not BatchNorm:
            _become_ours(module)
        for name, value in overrides.items():
            setattr(module, name, as_attribute(value))
    return model


def _become_ours(layer: Any) -> None:
    """The class alone is changed: wherever the layer is held, and by however many, it stays one object."""
    layer.__class__ = BatchNorm
    layer.count, layer.rows, layer.batch_moments = (nnx.data(None) for _ in range(3))
    for name, value in _SETTINGS.items():
        if name in _OWN or not hasattr(layer, name):
            setattr(layer, name, value)
    if not hasattr(layer, "num_features"):
        layer.num_features = layer.mean.get_value().shape[-1]


def _check_variables(module: nnx.Module) -> None:
    """Those of Flax's layer, before any layer is changed; another name of scale would be lost silently."""
    held = {name: getattr(module, name, ()) for name in ("mean", "var", "scale", "bias")}
    if wrong := [
        name
        for name, value in held.items()
        if not isinstance(value, nnx.Variable) and (value is not None or name in ("mean", "var"))
    ]:
        raise error(
            "classes",
            f"one with {type(module).__name__}, which has no variable {', '.join(wrong)}",
            "classes with the variables mean, var, scale and bias, the last two None where a layer has none",
            "Give them these names in the class.",
        )
