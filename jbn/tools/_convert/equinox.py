"""One layer's arrays, from and to Equinox, whose statistics are in a State."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jbn._core.errors import describe, error, public
from jbn._core.types import BatchStats, Params
from jbn.tools._convert.arrays import debias_factor, label_of, read, to_jax, to_numpy, write
from jbn.tools._convert.libraries import EQUINOX, check_names


@public
def from_equinox(state: Mapping[str, Any], *, momentum: float) -> tuple[dict[str, Array], dict[str, Array]]:
    """params and batch_stats of an Equinox BatchNorm and its State.

        mean, var = state.get(bn.batch_state_index)
        arrays = dict(weight=bn.weight, bias=bn.bias, mean=mean, var=var, counter=state.get(bn.batch_counter))
        params, batch_stats = from_equinox(arrays, momentum=bn.momentum)

    This is for mode="batch". For mode="ema" it is `ema_state_index`, and, in place of counter, `first_time`
    from `ema_first_time_index`. Evaluation gives the same outputs (`axis=1` for a vmap over [N, C, ..]).

    - In mode="batch" Equinox evaluates with mean and var over 1 - momentum**counter, and these quotients
      become mean and var. (Equinox starts var at 1, so its quotient is too large while counter is small.)
      `counter` becomes `count`, int32. In further training the next batch weighs 1 - momentum here; in
      Equinox it weighs more while counter is small. Evaluate without `debias`: they are debiased already.
    - In mode="ema" it evaluates with mean and var as they are, and there is no count. In training it
      normalizes by them too, where we normalize by the batch.
    - It stores the biased variance, and momentum weighs the OLD statistics, both as here.
    - eps is 1e-5, as here.

    Args:
      state: weight and bias (None or missing in a layer without), mean, var, each [C]; and counter, or
        first_time.
      momentum: of the layer, at least 0 and below 1; used in mode="batch".

    Returns:
      params with `scale`, `bias`, and batch_stats with `mean`, `var`, `count`: copies, as JAX arrays.

    Raises:
      ValueError: entries that are missing or unknown, by name, or of a wrong shape or dtype; a momentum
        out of range; mode="ema" before the first batch, when there are no statistics.

    Example:
      >>> import jax.numpy as jnp, jbn.tools
      >>> state = {"mean": jnp.array([0.25]), "var": jnp.array([1.0]), "counter": jnp.array(1)}
      >>> params, batch_stats = jbn.tools.from_equinox(state, momentum=0.75)
      >>> print(params, batch_stats["mean"], batch_stats["var"])
      {} [1.] [4.]

    Reference: equinox.nn.BatchNorm of Equinox 0.13.
    """
    given = {k: v for k, v in state.items() if v is not None} if isinstance(state, Mapping) else state
    by_time = isinstance(given, dict) and "first_time" in given
    required = ("mean", "var", "first_time" if by_time else "counter")
    check_names("state", given, required, ("weight", "bias", *required), EQUINOX.reading)
    first = to_numpy("state['first_time']", given.pop("first_time", False))
    if first.dtype != bool or first.shape:
        raise error("state['first_time']", describe(first), "one bool", EQUINOX.reading)
    if first:
        fix = "Before the first batch a layer in mode='ema' has no statistics: start from jbn.init."
        raise error("state['first_time']", "True", "a layer that has seen a batch", fix)
    params, batch_stats = read(EQUINOX, given)
    if "count" in batch_stats:
        for name in ("mean", "var"):
            value = batch_stats[name]
            share = _debias_factor_or_1(momentum, batch_stats["count"], value)
            batch_stats[name] = (value.astype(share.dtype) / share).astype(value.dtype)
    return params, batch_stats


@public
def to_equinox(params: Params | None, batch_stats: BatchStats, *, momentum: float) -> dict[str, Array | None]:
    """The arrays of an Equinox BatchNorm and its State: the inverse of `from_equinox`.

        arrays = to_equinox(params, batch_stats, momentum=bn.momentum)
        affine, both = (arrays["weight"], arrays["bias"]), (arrays["mean"], arrays["var"])
        bn = eqx.tree_at(lambda bn: (bn.weight, bn.bias), bn, affine, is_leaf=lambda leaf: leaf is None)
        state = state.set(bn.batch_state_index, both).set(bn.batch_counter, arrays["counter"])

    This is for mode="batch", to which batch_stats with a `count` belong. Those without give `first_time`,
    for mode="ema": `ema_state_index` and `ema_first_time_index`.

    In mode="ema" the inverse is exact, bit for bit. In mode="batch" mean and var are multiplied by
    1 - momentum**count, and there and back they may be off by 2 units in the last place, in either
    direction, until that factor has become 1.

    Args:
      params: `scale` and `bias`, or neither: Equinox has them together only.
      batch_stats: `mean`, `var`, and `count` for mode="batch". If the number of updates is not known, a large
        one, such as 1000000, says that the statistics are settled.
      momentum: of the layer, at least 0 and below 1; used in mode="batch".

    Returns:
      weight and bias (None where params has none), mean, var, and counter or first_time. JAX arrays.

    Raises:
      ValueError: as `from_equinox`.

    Example:
      >>> import jbn.tools
      >>> print(jbn.tools.to_equinox(*jbn.init(2), momentum=0.99)["weight"])
      [1. 1.]
    """
    arrays = write(EQUINOX, params, batch_stats)
    counter = arrays.pop("counter", None)
    new = {name: to_jax(label_of(name), array) for name, array in arrays.items()}
    affine = {name: new.get(name) for name in ("weight", "bias")}
    if counter is None:
        return affine | new | {"first_time": jnp.array(False)}
    for name in ("mean", "var"):
        value = new[name]
        share = _debias_factor_or_1(momentum, jnp.asarray(counter.astype(np.int32)), value)
        new[name] = (value.astype(share.dtype) * share).astype(value.dtype)
    # Weakly typed, as the counter that the layer starts with: State.set takes no other.
    return affine | new | {"counter": jnp.array(int(counter))}


def _debias_factor_or_1(momentum: Any, count: Array, value: Array) -> Array:
    """`weight_of_updates`, and 1 before the first one."""
    share = debias_factor("momentum", momentum, count, value)
    return jnp.where(count == 0, jnp.ones_like(share), share)
