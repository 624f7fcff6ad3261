"""Debiasing: statistics with nothing of the initial 0 and 1 left in them."""

from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array

from jbn._checks import check_momentum, error
from jbn._options import check_constant
from jbn._running import debiased, settled
from jbn._types import BatchStats
from jbn.tools._trees import Variables, batch_norms, with_values

Model = TypeVar("Model", bound=Variables)


def debias(variables: Model, *, momentum: float | None = 0.99) -> Model:
    """A model whose statistics are those that its layers, with `debias=True`, evaluate with.

        mean / (1 - momentum^count),  (var - momentum^count) / (1 - momentum^count)

    For everything that reads statistics and does not know how the layers are set: `fold`, `to_torch` and its
    like, `report`, or a model without `debias`. `count` becomes 2^30, as after updates without end, so that
    layers with `debias=True` compute what they did, and debiasing twice changes nothing.

    Args:
      variables: linen variables or an NNX module; not changed.
      momentum: that of the layers, which this call cannot see. None, cumulative statistics, changes nothing.

    Returns:
      A model of the same kind with new `mean`, `var` and `count` where a batch norm has a `count`, and what
      it had elsewhere and before the first update.

    Raises:
      ValueError: a model without batch norm or without a `count`, a momentum that is no number from 0 to 1.

    Example:
      >>> import jax.numpy as jnp, jbn, jbn.tools
      >>> _, old = jbn.init(1, count=True)
      >>> new = jbn.update(old, jbn.moments(jnp.array([[1.0], [3.0]])), momentum=0.75)
      >>> debiased = jbn.tools.debias({"batch_stats": new}, momentum=0.75)["batch_stats"]
      >>> print(new["mean"], debiased["mean"].round(5))
      [0.5] [2.]

    Reference: Kingma and Ba 2014, arXiv 1412.6980, section 3.
    """
    call = "tools.debias"
    check_momentum(call, momentum)
    check_constant(call, momentum)
    layers = batch_norms(call, variables)
    counted = {path: stats for path, (_, stats) in layers.items() if "count" in stats}
    if not counted:
        expected = "a batch norm with a count, as debias=True keeps it"
        raise error(call, "variables", "a model without one", expected, "Without it nothing is debiased.")
    new: Model = with_values(
        call,
        variables,
        batch_stats={path: unbiased_start(stats, momentum) for path, stats in counted.items()},
    )
    return new


def unbiased_start(batch_stats: BatchStats, momentum: float | None) -> dict[str, Array]:
    """`debias` of one batch norm that has a count."""
    count = jnp.asarray(batch_stats["count"])
    kept = {name: debiased(batch_stats, momentum)[name] for name in ("mean", "var")}
    values = {name: value.astype(batch_stats[name].dtype) for name, value in kept.items()}
    return {**batch_stats, **values, "count": jnp.where(count > 0, settled(count), count)}
