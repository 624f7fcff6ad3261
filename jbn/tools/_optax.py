"""Which parameters are those of batch norms, for Optax: found by where statistics live, not by name."""

from typing import Any

from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jbn._core.errors import public
from jbn.tools._models import Variables, as_dicts, batch_norms, unflatten_like


@public
def weight_decay_mask(variables: Variables) -> Any:
    """False for scale and bias of batch norms, True for all other parameters: the mask of `optax.adamw`.

    Decay of a scale shrinks what the next layer sees and does nothing else, so many recipes leave it out.

    Args:
      variables: linen variables with `params` and `batch_stats`, or an NNX module.

    Returns:
      A tree of bools: of the structure of `variables["params"]`, or of the `nnx.State` that
      `nnx.Optimizer(model, ..., wrt=nnx.Param)` gives Optax.

    Raises:
      ValueError: a model without batch norm.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jbn.linen, jbn.tools
      >>> model = nn.Sequential([nn.Dense(2), jbn.linen.BatchNorm(use_running_average=True)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((4, 3)))
      >>> print(jbn.tools.weight_decay_mask(variables)["layers_1"])
      {'bias': False, 'scale': False}
    """
    return _label(variables, False, True)


@public
def freeze(variables: Variables) -> Any:
    """The label "frozen" for scale and bias of batch norms, "trainable" for all others.

        optax.multi_transform({"trainable": optax.adam(1e-3), "frozen": optax.set_to_zero()}, labels)

    Scale and bias then stay as they are; with `frozen=True` in the layer, its statistics do too.

    Args:
      variables: linen variables with `params` and `batch_stats`, or an NNX module.

    Returns:
      A tree of labels, of the structure of `weight_decay_mask`.

    Raises:
      ValueError: a model without batch norm.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jbn.linen, jbn.tools
      >>> model = nn.Sequential([nn.Dense(2), jbn.linen.BatchNorm(use_running_average=True)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((4, 3)))
      >>> labels = jbn.tools.freeze(variables)
      >>> print(labels["layers_0"], labels["layers_1"])
      {'bias': 'trainable', 'kernel': 'trainable'} {'bias': 'frozen', 'scale': 'frozen'}
    """
    return _label(variables, "frozen", "trainable")


def _label(variables: Variables, inside: Any, outside: Any) -> Any:
    """The parameters' tree with one value in the place of those of batch norms, and another elsewhere."""
    norms = {(*path, name) for path, layer in batch_norms(variables).items() for name in layer.params}
    tree = as_dicts(variables).get("params", {})
    values = unflatten_dict({path: inside if path in norms else outside for path in flatten_dict(tree)})
    if isinstance(variables, nnx.Module):
        return nnx.State(values)
    return unflatten_like(variables.get("params", {}), values)
