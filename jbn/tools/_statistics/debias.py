"""Debiasing: statistics with nothing of the initial 0 and 1 left in them."""

from collections.abc import Mapping
from typing import Any, TypeVar

from flax import nnx

from jbn._core.dtypes import unwrapped
from jbn._core.errors import error, public
from jbn._core.options import check_momentum, check_static_momentum
from jbn._core.running import store_debiased
from jbn.nnx import BatchNorm
from jbn.tools._models import Path, Variables, batch_norms, by_name, join_paths, path_name, with_values

Model = TypeVar("Model", bound=Variables)


@public
def debias(
    variables: Model, *, momentum: float | Mapping[Path, float] | Mapping[str, float] | None = None
) -> Model:
    """A model with the statistics that its layers, with `debias=True`, use in evaluation.

        mean / (1 - momentum^count),  (var - momentum^count) / (1 - momentum^count)

    For everything that reads statistics without knowing the settings of the layers: `fold`, `to_torch` and
    the like, `report`, or a model without `debias`. `count` becomes 2^30, as after endless updates, so layers
    with `debias=True` still compute the same, and debiasing twice changes nothing.

    Args:
      variables: linen variables or an NNX module; not changed.
      momentum: of the layers with a `count`: a number for all of them, or a mapping from the path of each
        that is debiased, `"block/bn"` or `("block", "bn")`. None is for an NNX module, which knows
        the momentum of its layers, and which of them have `debias=True`.

    Returns:
      A model of the same kind with new `mean`, `var` and `count`; a batch norm before its first update keeps
      what it has.

    Raises:
      ValueError: a model without batch norm; a path to no batch norm, or to one without a `count`; a
        momentum that is missing or no number from 0 to 1.

    Example:
      >>> import jax.numpy as jnp, jbn, jbn.tools
      >>> _, old = jbn.init(1, count=True)
      >>> new = jbn.update(old, jbn.moments(jnp.array([[1.0], [3.0]])), momentum=0.75)
      >>> debiased = jbn.tools.debias({"batch_stats": new}, momentum=0.75)["batch_stats"]
      >>> print(new["mean"], debiased["mean"].round(5))
      [0.5] [2.]

    Reference: Kingma and Ba 2014, arXiv 1412.6980, section 3.
    """
    layers = {path: layer.batch_stats for path, layer in batch_norms(variables).items()}
    counted = {path_name(path): path for path, stats in layers.items() if "count" in stats}
    momenta: dict[str, Any]
    if isinstance(momentum, Mapping):
        momenta = by_name(momentum)
    elif momentum is None and isinstance(variables, nnx.Module):
        momenta = _momentum_of_layers(variables)
    else:
        momenta = dict.fromkeys(counted, momentum)
    if not counted:
        got, expected = "a model whose batch norms have no count", "one that counts its updates"
        raise error("variables", got, expected, "Layers with debias=True keep a count.")
    if not momenta or (unknown := [path for path in momenta if path not in counted]):
        got = f"one for {join_paths(unknown)}" if momenta else "given for no layer"
        expected = f"those of batch norms with a count: {join_paths(sorted(counted))}"
        raise error("momentum", got, expected, "Layers with debias=True keep a count.")
    for value in momenta.values():
        _check(value)
    stats = {counted[path]: store_debiased(layers[counted[path]], value) for path, value in momenta.items()}
    new: Model = with_values(variables, batch_stats=stats)
    return new


def _momentum_of_layers(model: nnx.Module) -> dict[str, Any]:
    """The momentum of each layer with debias=True."""
    modules: Any = nnx.iter_modules(model)
    layers = [(path, layer) for path, layer in modules if isinstance(layer, BatchNorm)]
    return {
        path_name(path): layer.momentum
        for path, layer in layers
        if layer.debias and layer.momentum is not None
    }


def _check(momentum: Any) -> None:
    if momentum is None:
        fix = "Cumulative statistics have nothing to debias: leave their layers out."
        raise error("momentum", "None", "a number from 0 to 1, that of the layers", fix)
    momentum = unwrapped(momentum)
    check_momentum(momentum)
    check_static_momentum(momentum)
