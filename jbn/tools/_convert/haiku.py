"""One layer's arrays, from and to Haiku, whose statistics are in moving averages of their own."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jbn._core.errors import error, public
from jbn._core.types import BatchStats, Params
from jbn.tools._convert.arrays import debias_factor, label_of, read, to_jax, to_numpy, write
from jbn.tools._convert.libraries import HAIKU, check_names


@public
def from_haiku(
    params: Mapping[str, Any], mean_ema: Mapping[str, Any], var_ema: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """params and batch_stats of a Haiku BatchNorm.

        emas = state["batch_norm/~/mean_ema"], state["batch_norm/~/var_ema"]
        layer_params, batch_stats = from_haiku(params.get("batch_norm", {}), *emas)

    Either moving average holds `hidden`, which starts at 0, the `counter` of updates, and
    `average = hidden / (1 - decay_rate**counter)`. Haiku evaluates with average, and that becomes mean or
    var: evaluation gives the same outputs. `hidden` follows from the other two and is left out.

    - Haiku stores the biased variance, as here.
    - Its decay_rate weighs the OLD statistics, as momentum here, and has no default; eps is 1e-5, as here.
    - `counter` becomes `count`, int32. In further training the next batch weighs 1 - momentum here; in Haiku
      it weighs more while the counter is small. Evaluate without `debias`: average is debiased already.

    Args:
      params: scale and offset as far as the layer has them, [1, .., 1, C] or [1, C, 1, .., 1].
      mean_ema: hidden, average, counter of the mean.
      var_ema: the same of the variance.

    Returns:
      params with `scale`, `bias`, and batch_stats with `mean`, `var`, `count`: [C], copies, as JAX arrays.

    Raises:
      ValueError: entries that are missing or unknown, by name, or of a wrong shape or dtype; counters
        that differ.

    Example:
      >>> import numpy as np, jbn.tools
      >>> ema = {"hidden": np.float32([[0.5, 1]]), "average": np.float32([[1, 2]]), "counter": np.array(1)}
      >>> params, batch_stats = jbn.tools.from_haiku({}, mean_ema=ema, var_ema=ema)
      >>> print(params, batch_stats["mean"], batch_stats["count"])
      {} [1. 2.] 1

    Reference: haiku.BatchNorm and haiku.ExponentialMovingAverage of Haiku 0.0.17.
    """
    ema = ("hidden", "average", "counter")
    check_names("params", params, (), ("scale", "offset"), HAIKU.reading)
    named = {f"params/{name}": value for name, value in params.items()}
    for argument, part in (("mean_ema", mean_ema), ("var_ema", var_ema)):
        check_names(argument, part, ema, ema, HAIKU.reading)
        named |= {f"{argument}/{name}": part[name] for name in ("average", "counter")}
    given = {name: _squeeze(name, value) for name, value in named.items()}
    counter, other = given["mean_ema/counter"], given.pop("var_ema/counter")
    if not np.array_equal(counter, other):
        expected = f"that of mean_ema, {counter}"
        raise error("var_ema['counter']", str(other), expected, HAIKU.reading)
    return read(HAIKU, given)


@public
def to_haiku(
    params: Params | None, batch_stats: BatchStats, *, decay_rate: float, ndim: int, axis: int = -1
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """The arrays of a Haiku BatchNorm: the inverse of `from_haiku`.

        params["batch_norm"], *emas = to_haiku(layer_params, batch_stats, decay_rate=0.9, ndim=4)
        state["batch_norm/~/mean_ema"], state["batch_norm/~/var_ema"] = emas

    From here to Haiku and back is the identity, bit for bit. From Haiku to here and back is too, except for
    `hidden`: it is computed again, as average * (1 - decay_rate**counter), and may be off by 2 units in the
    last place until that factor has become 1.

    Args:
      params: `scale`, `bias`, either or neither; a Haiku layer with neither has no params["batch_norm"].
      batch_stats: `mean`, `var` and `count`, which Haiku cannot do without. If the number of updates is not
        known, a large one, such as 1000000, says that the statistics are settled.
      decay_rate: of the layer, at least 0 and below 1.
      ndim: how many axes the inputs of the layer have.
      axis: which of them is the feature axis.

    Returns:
      params with scale, offset; and mean_ema and var_ema, with hidden, average, counter. JAX arrays.

    Raises:
      ValueError: as `from_haiku`; a decay_rate, or an axis, out of range.

    Example:
      >>> import jax.numpy as jnp, jbn.tools
      >>> params, batch_stats = jbn.init(2)
      >>> batch_stats["count"] = jnp.int32(1)
      >>> params, mean_ema, var_ema = jbn.tools.to_haiku(params, batch_stats, decay_rate=0.75, ndim=2)
      >>> print(params["scale"], var_ema["average"], var_ema["hidden"])
      [[1. 1.]] [[1. 1.]] [[0.25 0.25]]
    """
    arrays = write(HAIKU, params, batch_stats)
    integers = all(isinstance(value, (int, np.integer)) for value in (ndim, axis))
    if not integers or not -ndim <= axis < ndim:
        fix = "For NHWC pass ndim=4 and axis=-1, for NCHW ndim=4 and axis=1."
        raise error("axis", f"{axis} with ndim={ndim!r}", "an axis of the layer's inputs", fix)
    shape = [-1 if index == axis % ndim else 1 for index in range(ndim)]
    counter = jnp.asarray(arrays.pop("mean_ema/counter").astype(np.int32))
    new = {name: to_jax(label_of(name), array.reshape(shape)) for name, array in arrays.items()}
    emas = []
    for average in (new.pop("mean_ema/average"), new.pop("var_ema/average")):
        share = debias_factor("decay_rate", decay_rate, counter, average)
        hidden = (average.astype(share.dtype) * share).astype(average.dtype)
        emas.append({"hidden": hidden, "average": average, "counter": counter})
    return {name.removeprefix("params/"): array for name, array in new.items()}, emas[0], emas[1]


def _squeeze(name: str, value: Any) -> np.ndarray:
    """[C] of [1, .., 1, C] or [1, C, 1, .., 1]; anything else as it is."""
    array = to_numpy(label_of(name), value)
    return array.reshape(-1) if array.ndim and sum(size != 1 for size in array.shape) <= 1 else array
