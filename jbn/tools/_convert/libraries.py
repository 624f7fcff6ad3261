"""What other libraries call the arrays and settings of a batch norm, and how they keep them.

Each library is described once. Reading and writing arrays (`arrays.py`) and settings (`settings.py`) follow
its description and know no library by name, except for what only one of them does.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jbn._core.errors import describe, error, join_names


class Library(NamedTuple):
    """What a library calls our entries and settings, and what to do where something does not fit."""

    names: Mapping[str, str]  # of arrays, ours: theirs; without count where it keeps no counter
    settings: Mapping[str, tuple[str, Any]]  # theirs: ours and their default, `...` where it has none
    reading: str
    writing: str = "Pass the collections of one layer, for example variables['params']['BatchNorm_0']."
    counted: bool = False  # whether it cannot do without the counter
    together: tuple[str, ...] = ()  # of scale and bias, those that exist only beside the other one


def _names(*theirs: str) -> dict[str, str]:
    return dict(zip(("scale", "bias", "mean", "var", "count"), theirs, strict=False))


TORCH = Library(
    _names("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
    {
        "momentum": ("momentum", 0.1),
        "eps": ("epsilon", 1e-5),
        "affine": ("use_scale", True),
        "bias": ("use_bias", True),
    },
    "Pass bn.state_dict() of one batch norm; one with track_running_stats=False has no statistics.",
    together=("bias",),
)
KERAS = Library(
    _names("gamma", "beta", "moving_mean", "moving_variance"),
    {
        "axis": ("axis", -1),
        "momentum": ("momentum", 0.99),
        "epsilon": ("epsilon", 1e-3),
        "scale": ("use_scale", True),
        "center": ("use_bias", True),
    },
    "Pass {v.name: v.value for v in layer.weights} of one BatchNormalization without renorm.",
    "Pass the collections of one layer, without its count: Keras keeps none.",
)
HAIKU = Library(
    _names("params/scale", "params/offset", "mean_ema/average", "var_ema/average", "mean_ema/counter"),
    {
        "data_format": ("axis", "channels_last"),
        "decay_rate": ("momentum", ...),
        "eps": ("epsilon", 1e-5),
        "create_scale": ("use_scale", ...),
        "create_offset": ("use_bias", ...),
        "cross_replica_axis": ("axis_name", None),
        "cross_replica_axis_index_groups": ("axis_index_groups", None),
    },
    "Pass params['batch_norm'], state['batch_norm/~/mean_ema'] and state['batch_norm/~/var_ema'].",
    "Pass one layer's, with the number of updates: {**batch_stats, 'count': jnp.int32(updates)}.",
    counted=True,
)
EQUINOX = Library(
    _names("weight", "bias", "mean", "var", "counter"),
    {
        "axis_name": ("axis_name", ...),
        "momentum": ("momentum", 0.99),
        "eps": ("epsilon", 1e-5),
        "channelwise_affine": ("use_scale", True),
        "mode": ("mode", ...),
    },
    "The docstring of from_equinox shows how to take them out of a layer and its State.",
    together=("scale", "bias"),
)
LIBRARIES = {"torch": TORCH, "keras": KERAS, "haiku": HAIKU, "equinox": EQUINOX}


def brief(value: Any) -> str:
    """`describe`, but of a container, which may hold whole arrays, its type and length."""
    if isinstance(value, (Mapping, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return describe(value)


def check_names(
    argument: str, given: Any, required: Collection[str], allowed: Collection[str], fix: str
) -> None:
    """A mapping with all that is required, and nothing else than what is allowed; an error names both."""
    if not isinstance(given, Mapping):
        raise error(argument, brief(given), f"a mapping with {', '.join(allowed)}", fix)
    unknown = [str(name) for name in given if name not in allowed]
    missing = [name for name in required if name not in given]
    found = [f"with the unknown {join_names(unknown)}"] if unknown else []
    found += [f"without {', '.join(missing)}"] if missing else []
    if found:
        optional = [name for name in allowed if name not in required]
        expected = [", ".join(required)] if required else []
        expected += [f"perhaps {', '.join(optional)}"] if optional else []
        raise error(argument, f"a mapping {' and '.join(found)}", ", and ".join(expected), fix)


def check_together(argument: str, affine: Collection[str], together: Collection[str]) -> None:
    """A library may have a scale, or a bias, only beside the other one."""
    if len(affine) == 1 and (alone := next(iter(affine))) in together:
        other, value = ("bias", "zeros") if alone == "scale" else ("scale", "ones")
        fix = f"Add a {other} of {value}, which changes nothing."
        raise error(argument, f"a {alone} without a {other}", f"a {alone} only beside a {other}", fix)
