"""One layer's arrays and settings, from and to the batch norms of other libraries.

Tables say what each library calls our entries and settings; reading, writing and checking are written once.
No other library is imported: tensors are read through NumPy. Nothing is dropped or made up in silence: what
is missing, or has no counterpart, is an error that names it.
"""

from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jbn._checks import error
from jbn._types import BatchStats, Params, describe, wide


class _Library(NamedTuple):
    """What a library calls our entries, and what to do where something does not fit."""

    names: Mapping[str, str]  # ours: theirs; without count where it keeps no counter
    reading: str
    writing: str = "Pass the collections of one layer, for example variables['params']['BatchNorm_0']."
    counted: bool = False  # whether it cannot do without the counter
    together: tuple[str, ...] = ()  # of scale and bias, those that exist only beside the other one


def _names(*theirs: str) -> dict[str, str]:
    return dict(zip(("scale", "bias", "mean", "var", "count"), theirs, strict=False))


_TORCH = _Library(
    _names("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
    "Pass bn.state_dict() of one batch norm; one with track_running_stats=False has no statistics.",
    together=("bias",),
)
_KERAS = _Library(
    _names("gamma", "beta", "moving_mean", "moving_variance"),
    "Pass {v.name: v.value for v in layer.weights} of one BatchNormalization without renorm.",
    "Pass the collections of one layer, without its count: Keras keeps none.",
)
_HAIKU = _Library(
    _names("params/scale", "params/offset", "mean_ema/average", "var_ema/average", "mean_ema/counter"),
    "Pass params['batch_norm'], state['batch_norm/~/mean_ema'] and state['batch_norm/~/var_ema'].",
    "Pass one layer's, with the number of updates: {**batch_stats, 'count': jnp.int32(updates)}.",
    counted=True,
)
_EQUINOX = _Library(
    _names("weight", "bias", "mean", "var", "counter"),
    "The docstring of from_equinox shows how to take them out of a layer and its State.",
    together=("scale", "bias"),
)


def from_torch(state: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """params and batch_stats of a PyTorch BatchNorm1d, 2d, 3d or SyncBatchNorm.

        params, batch_stats = from_torch(bn.state_dict())

    Arrays keep their values and dtypes, and evaluation gives the same outputs (`axis=1` for NCHW).

    - PyTorch stores the unbiased variance, n / (n - 1) times that of the batch, and evaluates with it as it
      is; so do we with what comes over.
    - Its momentum weighs the NEW batch: 0.1 is 0.9 here. Its eps is 1e-5, as here. See `settings_from`.
    - `num_batches_tracked` becomes `count`, int32; a state without it gives none. PyTorch uses it with
      momentum=None only.

    Args:
      state: weight and bias as far as the layer has them, running_mean, running_var, each [C], and
        num_batches_tracked: tensors of any dtype and device, or arrays.

    Returns:
      params with `scale`, `bias`, and batch_stats with `mean`, `var`, `count`: copies, as JAX arrays.

    Raises:
      ValueError: entries that are missing or unknown, all by name, or of a wrong shape or dtype.

    Example:
      >>> import numpy as np, jbn.tools
      >>> state = {"running_mean": np.float32([0.5, 2]), "running_var": np.float32([1, 4])}
      >>> params, batch_stats = jbn.tools.from_torch(state | {"num_batches_tracked": np.array(7)})
      >>> print(params, batch_stats["mean"], batch_stats["count"])
      {} [0.5 2. ] 7

    Reference: torch.nn.BatchNorm2d of PyTorch 2.
    """
    return _read("tools.from_torch", _TORCH, state)


def to_torch(params: Params | None, batch_stats: BatchStats) -> dict[str, np.ndarray]:
    """The state_dict of a PyTorch batch norm: the inverse of `from_torch`, bit for bit.

        arrays = to_torch(params, batch_stats)
        bn.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})

    Of a bfloat16 array, which PyTorch cannot take from NumPy, the tensor is
    `torch.from_numpy(array.view("int16")).view(torch.bfloat16)`.

    Args:
      params: `scale` and `bias`, or `scale`, or neither: PyTorch has no bias without a weight.
      batch_stats: `mean`, `var`, and perhaps `count`. Without it there is no num_batches_tracked either, and
        load_state_dict leaves the layer's own as it is.

    Returns:
      NumPy arrays, copies: weight, bias, running_mean, running_var, and num_batches_tracked as int64.

    Raises:
      ValueError: as `from_torch`.

    Example:
      >>> import jbn.tools
      >>> print(jbn.tools.to_torch(*jbn.init(2))["running_var"])
      [1. 1.]
    """
    arrays = _write("tools.to_torch", _TORCH, params, batch_stats)
    if "num_batches_tracked" in arrays:
        arrays["num_batches_tracked"] = arrays["num_batches_tracked"].astype(np.int64)
    return arrays


def from_keras(state: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """params and batch_stats of a Keras BatchNormalization.

        params, batch_stats = from_keras({v.name: v.value for v in layer.weights})

    The names matter: of three arrays in `get_weights()`, a bare list, the first may be gamma or beta. Arrays
    keep their values and dtypes, and evaluation gives the same outputs.

    - Keras stores the biased variance, and its momentum weighs the OLD statistics, both as here.
    - Its epsilon is 1e-3 where the layer does not say otherwise, and 1e-5 here. See `settings_from`.
    - It has no counter. Batch renormalization (renorm=True) has no counterpart.

    Args:
      state: gamma and beta as far as the layer has them, moving_mean, moving_variance, each [C].

    Returns:
      params with `scale`, `bias`, and batch_stats with `mean`, `var`: copies, as JAX arrays.

    Raises:
      ValueError: entries that are missing or unknown, all by name, or of a wrong shape or dtype.

    Example:
      >>> import numpy as np, jbn.tools
      >>> state = {"moving_mean": np.float32([0.5, 2]), "moving_variance": np.float32([1, 4])}
      >>> params, batch_stats = jbn.tools.from_keras(state | {"beta": np.float32([0.1, 0.2])})
      >>> print(params["bias"], batch_stats["var"])
      [0.1 0.2] [1. 4.]

    Reference: keras.layers.BatchNormalization of Keras 3.
    """
    return _read("tools.from_keras", _KERAS, state)


def to_keras(params: Params | None, batch_stats: BatchStats) -> dict[str, np.ndarray]:
    """The variables of a Keras BatchNormalization by name: the inverse of `from_keras`, bit for bit.

        arrays = to_keras(params, batch_stats)
        layer.set_weights([arrays[v.name] for v in layer.weights])

    Args:
      params: `scale`, `bias`, either or neither.
      batch_stats: `mean` and `var`. A `count` is an error: Keras has no place for it.

    Returns:
      NumPy arrays, copies: gamma, beta, moving_mean, moving_variance.

    Raises:
      ValueError: as `from_keras`.

    Example:
      >>> import jbn.tools
      >>> print(jbn.tools.to_keras(*jbn.init(2))["gamma"])
      [1. 1.]
    """
    return _write("tools.to_keras", _KERAS, params, batch_stats)


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
      it weighs more while the counter is small.

    Args:
      params: scale and offset as far as the layer has them, [1, .., 1, C] or [1, C, 1, .., 1].
      mean_ema: hidden, average, counter of the mean.
      var_ema: the same of the variance.

    Returns:
      params with `scale`, `bias`, and batch_stats with `mean`, `var`, `count`: [C], copies, as JAX arrays.

    Raises:
      ValueError: entries that are missing or unknown, all by name, or of a wrong shape or dtype; counters
        that differ.

    Example:
      >>> import numpy as np, jbn.tools
      >>> ema = {"hidden": np.float32([[0.5, 1]]), "average": np.float32([[1, 2]]), "counter": np.array(1)}
      >>> params, batch_stats = jbn.tools.from_haiku({}, mean_ema=ema, var_ema=ema)
      >>> print(params, batch_stats["mean"], batch_stats["count"])
      {} [1. 2.] 1

    Reference: haiku.BatchNorm and haiku.ExponentialMovingAverage of Haiku 0.0.17.
    """
    call, ema = "tools.from_haiku", ("hidden", "average", "counter")
    _check_names(call, "params", params, (), ("scale", "offset"), _HAIKU.reading)
    given = {f"params/{name}": _flat(value) for name, value in params.items()}
    for argument, part in (("mean_ema", mean_ema), ("var_ema", var_ema)):
        _check_names(call, argument, part, ema, ema, _HAIKU.reading)
        given |= {f"{argument}/{name}": _flat(part[name]) for name in ("average", "counter")}
    counter, other = given["mean_ema/counter"], given.pop("var_ema/counter")
    if not np.array_equal(counter, other):
        expected = f"that of mean_ema, {counter}"
        raise error(call, "var_ema['counter']", str(other), expected, _HAIKU.reading)
    return _read(call, _HAIKU, given)


def to_haiku(
    params: Params | None, batch_stats: BatchStats, *, decay_rate: float, ndim: int, axis: int = -1
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """The arrays of a Haiku BatchNorm: the inverse of `from_haiku`.

        params["batch_norm"], *emas = to_haiku(layer_params, batch_stats, decay_rate=0.9, ndim=4)
        state["batch_norm/~/mean_ema"], state["batch_norm/~/var_ema"] = emas

    From here to Haiku and back is the identity, bit for bit. From Haiku to here and back is too, but for
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
    call = "tools.to_haiku"
    arrays = _write(call, _HAIKU, params, batch_stats)
    if not -ndim <= axis < ndim:
        fix = "For NHWC pass ndim=4 and axis=-1, for NCHW ndim=4 and axis=1."
        raise error(call, "axis", f"{axis} with ndim={ndim}", "an axis of the layer's inputs", fix)
    shape = [-1 if index == axis % ndim else 1 for index in range(ndim)]
    counter = jnp.asarray(arrays.pop("mean_ema/counter").astype(np.int32))
    new = {name: _as_jax(call, _label(name), array.reshape(shape)) for name, array in arrays.items()}
    emas = []
    for average in (new.pop("mean_ema/average"), new.pop("var_ema/average")):
        share = _share(call, "decay_rate", decay_rate, counter, average)
        hidden = (average.astype(share.dtype) * share).astype(average.dtype)
        emas.append({"hidden": hidden, "average": average, "counter": counter})
    return {name.removeprefix("params/"): array for name, array in new.items()}, emas[0], emas[1]


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
      Equinox it weighs more while counter is small.
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
      ValueError: entries that are missing or unknown, all by name, or of a wrong shape or dtype; a momentum
        out of range; mode="ema" before the first batch, when there are no statistics.

    Example:
      >>> import jax.numpy as jnp, jbn.tools
      >>> state = {"mean": jnp.array([0.25]), "var": jnp.array([1.0]), "counter": jnp.array(1)}
      >>> params, batch_stats = jbn.tools.from_equinox(state, momentum=0.75)
      >>> print(params, batch_stats["mean"], batch_stats["var"])
      {} [1.] [4.]

    Reference: equinox.nn.BatchNorm of Equinox 0.13.
    """
    call = "tools.from_equinox"
    given = {k: v for k, v in state.items() if v is not None} if isinstance(state, Mapping) else state
    required = ("mean", "var", "first_time" if "first_time" in given else "counter")
    _check_names(call, "state", given, required, ("weight", "bias", *required), _EQUINOX.reading)
    if given.pop("first_time", False):
        fix = "Before the first batch a layer in mode='ema' has no statistics: start from jbn.init."
        raise error(call, "state['first_time']", "True", "a layer that has seen a batch", fix)
    params, batch_stats = _read(call, _EQUINOX, given)
    if "count" in batch_stats:
        for name in ("mean", "var"):
            value = batch_stats[name]
            share = _equinox_share(call, momentum, batch_stats["count"], value)
            batch_stats[name] = (value.astype(share.dtype) / share).astype(value.dtype)
    return params, batch_stats


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
    call = "tools.to_equinox"
    arrays = _write(call, _EQUINOX, params, batch_stats)
    counter = arrays.pop("counter", None)
    new = {name: _as_jax(call, _label(name), array) for name, array in arrays.items()}
    affine = {name: new.get(name) for name in ("weight", "bias")}
    if counter is None:
        return affine | new | {"first_time": jnp.array(False)}
    for name in ("mean", "var"):
        value = new[name]
        share = _equinox_share(call, momentum, jnp.asarray(counter.astype(np.int32)), value)
        new[name] = (value.astype(share.dtype) * share).astype(value.dtype)
    # Weakly typed, as the counter that the layer starts with: State.set takes no other.
    return affine | new | {"counter": jnp.array(int(counter))}


def _read(
    call: str, library: _Library, given: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Ours from theirs."""
    names = library.names
    required = [names[name] for name in ("mean", "var")]
    _check_names(call, "state", given, required, names.values(), library.reading)
    arrays = {name: _host(given[theirs]) for name, theirs in names.items() if theirs in given}
    labels = {name: _label(names[name]) for name in arrays}
    _check_arrays(call, labels, arrays, library.reading)
    if "count" in arrays:
        arrays["count"] = arrays["count"].astype(np.int32)
    new = {name: _as_jax(call, labels[name], array) for name, array in arrays.items()}
    params = {name: new.pop(name) for name in ["scale", "bias"] if name in new}
    return params, new


def _write(
    call: str, library: _Library, params: Params | None, batch_stats: BatchStats
) -> dict[str, np.ndarray]:
    """Theirs from ours."""
    params, names = {} if params is None else params, library.names
    statistics = [name for name in ("mean", "var", "count") if name in names]
    required = statistics if library.counted else ["mean", "var"]
    _check_names(call, "params", params, (), ("scale", "bias"), library.writing)
    _check_names(call, "batch_stats", batch_stats, required, statistics, library.writing)
    _check_together(call, "params", params, library.together)
    given = {**params, **batch_stats}
    arrays = {name: _host(given[name]) for name in names if name in given}
    labels = {n: f"{'params' if n in params else 'batch_stats'}[{n!r}]" for n in arrays}
    _check_arrays(call, labels, arrays, library.writing)
    return {names[name]: array for name, array in arrays.items()}


def _check_names(
    call: str, argument: str, given: Any, required: Collection[str], allowed: Collection[str], fix: str
) -> None:
    """A mapping with all that is required and nothing that is not allowed; otherwise every name is said."""
    if not isinstance(given, Mapping):
        raise error(call, argument, describe(given), f"a mapping with {', '.join(allowed)}", fix)
    unknown = [str(name) for name in given if name not in allowed]
    missing = [name for name in required if name not in given]
    found = [f"with the unknown {', '.join(unknown)}"] if unknown else []
    found += [f"without {', '.join(missing)}"] if missing else []
    if found:
        optional = [name for name in allowed if name not in required]
        expected = [", ".join(required)] if required else []
        expected += [f"perhaps {', '.join(optional)}"] if optional else []
        raise error(call, argument, f"a mapping {' and '.join(found)}", ", and ".join(expected), fix)


def _check_together(call: str, argument: str, affine: Collection[str], together: Collection[str]) -> None:
    """A library may have a scale, or a bias, only beside the other one."""
    if len(affine) == 1 and (alone := next(iter(affine))) in together:
        other, value = ("bias", "zeros") if alone == "scale" else ("scale", "ones")
        fix = f"Add a {other} of {value}, which changes nothing."
        raise error(call, argument, f"a {alone} without a {other}", f"a {alone} only beside a {other}", fix)


def _check_arrays(call: str, labels: Mapping[str, str], arrays: Mapping[str, np.ndarray], fix: str) -> None:
    """One float per channel in each, as many as in mean; a count is one integer that int32 can hold."""
    shape = (arrays["mean"].size,)
    for name, array in arrays.items():
        if name == "count":
            good = array.shape == () and jnp.issubdtype(array.dtype, jnp.integer)
            good = good and 0 <= int(array) < 2**31
            expected = "one integer from 0 to 2147483647"
        else:
            good = array.shape == shape and jnp.issubdtype(array.dtype, jnp.inexact)
            expected = f"floats of shape {shape}, one per channel"
        if not good:
            got = describe(array) if array.ndim else f"{describe(array)} of value {array}"
            raise error(call, labels[name], got, expected, fix)


def _host(value: Any) -> np.ndarray:
    """A copy as a NumPy array: whoever trains a tensor in place does not change it."""
    if callable(getattr(value, "detach", None)):  # a PyTorch tensor
        value = value.detach().cpu()
    try:
        return np.asarray(value).copy()
    except TypeError:  # a dtype that NumPy lacks: bfloat16
        return np.asarray(jax.dlpack.from_dlpack(value.contiguous())).copy()


def _as_jax(call: str, label: str, array: np.ndarray) -> Array:
    """The array as a JAX array, unless JAX would round it."""
    new = jnp.asarray(array)
    if new.dtype != array.dtype:
        fix = "Cast it to float32, or enable jax_enable_x64."
        raise error(call, label, describe(array), "a dtype that JAX keeps", fix)
    return new


def _label(theirs: str) -> str:
    """How errors show an entry of a table."""
    part, _, name = theirs.rpartition("/")
    return f"{part or 'state'}[{name!r}]"


def _flat(value: Any) -> np.ndarray:
    """[C] of [1, .., 1, C] or [1, C, 1, .., 1]; anything else as it is."""
    array = _host(value)
    return array.reshape(-1) if array.ndim and sum(size != 1 for size in array.shape) <= 1 else array


def _share(call: str, argument: str, momentum: Any, count: Array, value: Array) -> Array:
    """1 - momentum**count, of the dtype in which the value is scaled: what an average from 0 adds up to."""
    if not isinstance(momentum, (int, float, np.number)) or not 0 <= momentum < 1:
        fix = "Pass that of the layer."
        raise error(call, argument, describe(momentum), "a number from 0 up and below 1", fix)
    return 1 - lax.pow(jnp.asarray(momentum, wide(value.dtype)), count)


def _equinox_share(call: str, momentum: Any, count: Array, value: Array) -> Array:
    """The same, and 1 before the first update."""
    share = _share(call, "momentum", momentum, count, value)
    return jnp.where(count == 0, jnp.ones_like(share), share)


# Per library, what it calls our settings, and its default; `...` where it has none.
_SETTINGS: dict[str, dict[str, tuple[str, Any]]] = {
    "torch": {
        "momentum": ("momentum", 0.1),
        "eps": ("epsilon", 1e-5),
        "affine": ("use_scale", True),
        "bias": ("use_bias", True),
    },
    "keras": {
        "axis": ("axis", -1),
        "momentum": ("momentum", 0.99),
        "epsilon": ("epsilon", 1e-3),
        "scale": ("use_scale", True),
        "center": ("use_bias", True),
    },
    "haiku": {
        "data_format": ("axis", "channels_last"),
        "decay_rate": ("momentum", ...),
        "eps": ("epsilon", 1e-5),
        "create_scale": ("use_scale", ...),
        "create_offset": ("use_bias", ...),
        "cross_replica_axis": ("axis_name", None),
        "cross_replica_axis_index_groups": ("axis_index_groups", None),
    },
    "equinox": {
        "axis_name": ("axis_name", ...),
        "momentum": ("momentum", 0.99),
        "eps": ("epsilon", 1e-5),
        "channelwise_affine": ("use_scale", True),
        "mode": ("mode", ...),
    },
}
_OUR_SETTINGS = {"axis": -1, "momentum": 0.99, "epsilon": 1e-5, "use_scale": True, "use_bias": True}
_NO_COUNTERPART = "Leave out what has no counterpart, once you know that nothing is lost with it."
_TOGETHER = {"torch": _TORCH.together, "equinox": _EQUINOX.together}
_AXES = {"channels_last": -1, "channels_first": 1}


def settings_from(library: str, /, **theirs: Any) -> dict[str, Any]:
    """The settings of another library's layer, as keyword arguments of `jbn.linen` and `jbn.nnx.BatchNorm`.

    - "torch": momentum=0.1, eps=1e-5, affine=True, bias=True. momentum weighs the NEW batch: 0.1 is 0.9 here;
      None, the cumulative average, stays None (it is not 0).
    - "keras": axis=-1, momentum=0.99, epsilon=1e-3, scale=True, center=True.
    - "haiku": decay_rate, create_scale, create_offset, eps=1e-5, cross_replica_axis=None,
      cross_replica_axis_index_groups=None, data_format="channels_last". decay_rate is momentum here.
    - "equinox": axis_name, mode, momentum=0.99, eps=1e-5, channelwise_affine=True. Only mode="batch" has a
      counterpart: "ema" normalizes by the running statistics in training too.

    What is not given has the library's default, as above. PyTorch and Equinox have no setting for the feature
    axis, so the result has no `axis`: add that of your x.

    Args:
      library: "torch", "keras", "haiku" or "equinox".
      **theirs: settings of the layer.

    Returns:
      `momentum`, `epsilon`, `use_scale`, `use_bias`, and `axis`, `axis_name`, `axis_index_groups` where the
      library has such settings.

    Raises:
      ValueError: settings that are missing or have no counterpart, all by name, and values that have none.

    Example:
      >>> import jbn.tools
      >>> print(jbn.tools.settings_from("torch", momentum=0.1, affine=False))
      {'momentum': 0.9, 'epsilon': 1e-05, 'use_scale': False, 'use_bias': False}
    """
    call, table = "tools.settings_from", _settings("tools.settings_from", library)
    required = [name for name, (_, default) in table.items() if default is ...]
    _check_names(call, "theirs", theirs, required, table, _NO_COUNTERPART)
    ours = {key: theirs.get(name, default) for name, (key, default) in table.items()}
    if library == "torch":
        ours["use_bias"] = ours["use_scale"] and ours["use_bias"]
    if library == "haiku":
        ours["axis"] = _one_of(call, "data_format", ours["axis"], _AXES)
    if library == "equinox":
        _one_of(call, "mode", ours.pop("mode"), {"batch": None})
        ours["use_bias"] = ours["use_scale"]
    return ours | {"momentum": _momentum(call, library, ours["momentum"])}


def settings_to(library: str, /, **ours: Any) -> dict[str, Any]:
    """The inverse of `settings_from`: keyword arguments for another library's layer.

    Args:
      library: "torch", "keras", "haiku" or "equinox".
      **ours: what `settings_from` returns for that library. What is not given has the default of
        `jbn.linen.BatchNorm`; Equinox needs an axis_name.

    Returns:
      All the settings that `settings_from` lists; PyTorch's bias, which older versions do not know, only
      where it differs from affine.

    Raises:
      ValueError: settings that are missing or have no counterpart, all by name, and values that have none,
        such as momentum=None, the cumulative average, outside PyTorch.

    Example:
      >>> import jbn.tools
      >>> print(jbn.tools.settings_to("torch", momentum=0.9))
      {'momentum': 0.1, 'eps': 1e-05, 'affine': True}
    """
    call, table = "tools.settings_to", _settings("tools.settings_to", library)
    keys = {key for key, _ in table.values()} - {"mode"} | {"use_bias"}
    required = ["axis_name"] if library == "equinox" else []
    _check_names(call, "ours", ours, required, sorted(keys), _NO_COUNTERPART)
    full = {key: ours.get(key, _OUR_SETTINGS.get(key)) for key in keys}
    affine = [name for name in ("scale", "bias") if full[f"use_{name}"]]
    _check_together(call, "ours", affine, _TOGETHER.get(library, ()))
    if library == "haiku":
        full["axis"] = _one_of(call, "axis", full["axis"], {axis: name for name, axis in _AXES.items()})
    full |= {"momentum": _momentum(call, library, full["momentum"]), "mode": "batch"}
    theirs = {name: full[key] for name, (key, _) in table.items()}
    if library == "torch" and theirs["bias"] == theirs["affine"]:
        del theirs["bias"]
    return theirs


def _settings(call: str, library: str) -> dict[str, tuple[str, Any]]:
    if library not in _SETTINGS:
        raise error(call, "library", repr(library), ", ".join(_SETTINGS), "Name one of these.")
    return _SETTINGS[library]


def _momentum(call: str, library: str, value: Any) -> float | None:
    """Theirs from ours or ours from theirs: the same but for PyTorch, whose weighs the new batch."""
    if library == "torch" and value is None:
        return None
    if not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
        fix = "Schedules have no counterpart, and None, the cumulative average, is for torch only."
        raise error(call, "momentum", describe(value), "a number from 0 to 1", fix)
    # As decimals: binary floats would make 0.09999999999999998 of 0.9.
    return float(1 - Decimal(str(value)) if library == "torch" else value)


def _one_of(call: str, argument: str, value: Any, known: Mapping[Any, Any]) -> Any:
    if value not in known:
        fix = "Anything else has no counterpart."
        raise error(call, argument, repr(value), " or ".join(map(repr, known)), fix)
    return known[value]
