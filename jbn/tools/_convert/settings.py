"""One layer's settings, from and to those of other libraries, as keyword arguments."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from jbn._core.errors import describe, error, public
from jbn._core.options import is_number
from jbn._core.renorm import Renorm
from jbn.tools._convert.libraries import LIBRARIES, Library, check_names, check_together

_OUR_SETTINGS = {"axis": -1, "momentum": 0.99, "epsilon": 1e-5, "use_scale": True, "use_bias": True}
_NO_COUNTERPART = "Leave out what has no counterpart, once you know that nothing is lost with it."
_NOTHING_ELSE = "Anything else has no counterpart."
_RENORM = ("renorm", "renorm_clipping")
_NO_LIMIT = {"rmax": np.inf, "rmin": 0, "dmax": np.inf}
_AXES = {"channels_last": -1, "channels_first": 1}
_FORMATS = {"channels_first|NC[^C]*": 1, "channels_last|N[^C]*C|(BT|TB)[^D]*D": -1}  # all that Haiku knows


@public
def settings_from(library: str, /, **theirs: Any) -> dict[str, Any]:
    """The settings of another library's layer, as keyword arguments of `jbn.linen` and `jbn.nnx.BatchNorm`.

    - "torch": momentum=0.1, eps=1e-5, affine=True, bias=True. momentum weighs the NEW batch: 0.1 is 0.9 here;
      None, the cumulative average, stays None (it is not 0).
    - "keras": axis=-1, momentum=0.99, epsilon=1e-3, scale=True, center=True; Keras 2 has [axis].
      Keras 2 and `tf.layers` have renorm=False, renorm_clipping=None too: `renorm` is then `jbn.Renorm`.
    - "haiku": decay_rate, create_scale, create_offset, eps=1e-5, cross_replica_axis=None,
      cross_replica_axis_index_groups=None, data_format="channels_last", or letters such as "NHWC".
      decay_rate is momentum here.
    - "equinox": axis_name, mode, momentum=0.99, eps=1e-5, channelwise_affine=True. Only mode="batch" has a
      counterpart: "ema" normalizes by the running statistics in training too.

    A setting that is not given has the library's default, as above. PyTorch and Equinox have no setting for
    the feature axis, so the result has no `axis`: add that of your x.

    Args:
      library: "torch", "keras", "haiku" or "equinox".
      **theirs: settings of the layer.

    Returns:
      `momentum`, `epsilon`, `use_scale`, `use_bias`, and `axis`, `axis_name`, `axis_index_groups` where the
      library has such settings; `renorm` where it is given.

    Raises:
      ValueError: settings that are missing or have no counterpart, by name, and values that have none.

    Example:
      >>> import jbn.tools
      >>> print(jbn.tools.settings_from("torch", momentum=0.1, affine=False))
      {'momentum': 0.9, 'epsilon': 1e-05, 'use_scale': False, 'use_bias': False}
    """
    table = _library(library).settings
    renorm = _renorm_from(theirs) if library == "keras" else {}
    theirs = {name: value for name, value in theirs.items() if not renorm or name not in _RENORM}
    required = [name for name, (_, default) in table.items() if default is ...]
    check_names("theirs", theirs, required, table, _NO_COUNTERPART)
    ours = {key: theirs.get(name, default) for name, (key, default) in table.items()}
    if library == "haiku":
        ours["axis"] = _feature_axis(ours["axis"])
    if library == "keras" and isinstance(ours["axis"], (list, tuple)) and len(ours["axis"]) == 1:
        ours["axis"] = ours["axis"][0]  # how Keras 2 and TensorFlow store it
    for name, (key, _) in table.items():
        _check_value(name, key, ours[key])
    if library == "torch":
        ours["use_bias"] = ours["use_scale"] and ours["use_bias"]
    if library == "equinox":
        _look_up("mode", ours.pop("mode"), {"batch": None})
        ours["use_bias"] = ours["use_scale"]
    return ours | {"momentum": _momentum(library, ours["momentum"])} | renorm


@public
def settings_to(library: str, /, **ours: Any) -> dict[str, Any]:
    """The inverse of `settings_from`: keyword arguments for another library's layer.

    Args:
      library: "torch", "keras", "haiku" or "equinox".
      **ours: what `settings_from` returns for that library. What is not given has the default of
        `jbn.linen.BatchNorm`; Equinox needs an axis_name.

    Returns:
      All the settings that `settings_from` lists; PyTorch's bias, which older versions do not know, only
      where it differs from affine, and Keras's renorm only where ours is given.

    Raises:
      ValueError: settings that are missing or have no counterpart, by name, and values that have none,
        such as momentum=None, the cumulative average, outside PyTorch.

    Example:
      >>> import jbn.tools
      >>> print(jbn.tools.settings_to("torch", momentum=0.9))
      {'momentum': 0.1, 'eps': 1e-05, 'affine': True}
    """
    described = _library(library)
    table = described.settings
    renorm = _renorm_to(ours.pop("renorm")) if library == "keras" and "renorm" in ours else {}
    keys = {key for key, _ in table.values()} - {"mode"} | {"use_bias"}
    required = ["axis_name"] if library == "equinox" else []
    check_names("ours", ours, required, sorted(keys), _NO_COUNTERPART)
    full = {key: ours.get(key, _OUR_SETTINGS.get(key)) for key in keys}
    for key, value in full.items():
        _check_value(key, key, value)
    affine = [name for name in ("scale", "bias") if full[f"use_{name}"]]
    check_together("ours", affine, described.together)
    if library == "haiku":
        full["axis"] = _look_up("axis", full["axis"], {axis: name for name, axis in _AXES.items()})
    full |= {"momentum": _momentum(library, full["momentum"]), "mode": "batch"}
    theirs = {name: full[key] for name, (key, _) in table.items()}
    if library == "torch" and theirs["bias"] == theirs["affine"]:
        del theirs["bias"]
    return theirs | renorm


def _renorm_from(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our `renorm`, if theirs is given: a limit that `renorm_clipping` lacks is none."""
    given = [name for name in _RENORM if name in theirs]
    if not given:
        return {}
    renorm, clipping = theirs.get("renorm", False), theirs.get("renorm_clipping") or {}
    _check_value("renorm", "use_renorm", renorm)
    ranges = {"rmax": (1, np.inf), "rmin": (0, 1), "dmax": (0, np.inf)}
    if not isinstance(clipping, Mapping) or not all(
        name in ranges and is_number(value) and ranges[name][0] <= value <= ranges[name][1]
        for name, value in clipping.items()
    ):
        expected = "a mapping with perhaps rmax from 1 up, rmin from 0 to 1, dmax from 0 up"
        raise error("renorm_clipping", describe(clipping), expected, "Pass that of the layer.")
    limits = Renorm(clipping.get("rmax", np.inf), clipping.get("dmax", np.inf), clipping.get("rmin", 0.0))
    return {"renorm": limits if renorm else None}


def _renorm_to(renorm: Any) -> dict[str, Any]:
    """Theirs from our `renorm`, in which None is 1 / r_max."""
    if renorm is None:
        return {"renorm": False, "renorm_clipping": None}
    limits = vars(renorm) if isinstance(renorm, Renorm) else {}
    if not limits or not all(value is None or is_number(value) for value in limits.values()):
        fix = "Values of a schedule are not kept by the layer: pass the last of them."
        raise error("renorm", describe(renorm), "None or jbn.Renorm with numbers", fix)
    r_min = 1 / renorm.r_max if renorm.r_min is None else renorm.r_min
    clipping = {"rmax": renorm.r_max, "rmin": r_min, "dmax": renorm.d_max}
    limits = {name: value for name, value in clipping.items() if value != _NO_LIMIT[name]}
    return {"renorm": True, "renorm_clipping": limits}


def _library(library: Any) -> Library:
    if not isinstance(library, str) or library not in LIBRARIES:
        raise error("library", repr(library), ", ".join(LIBRARIES), "Name one of these.")
    return LIBRARIES[library]


def _momentum(library: str, value: Any) -> float | None:
    """Theirs from ours or ours from theirs: the same but for PyTorch, whose weighs the new batch."""
    if library == "torch" and value is None:
        return None
    if not is_number(value) or not 0 <= value <= 1:
        fix = "Schedules have no counterpart, and None, the cumulative average, is for torch only."
        raise error("momentum", describe(value), "a number from 0 to 1", fix)
    # As decimals: binary floats would make 0.09999999999999998 of 0.9.
    return float(1 - Decimal(str(value)) if library == "torch" else value)


def _check_value(name: str, key: str, value: Any) -> None:
    """A setting that is ours by that key, and given by that name, is of the right kind."""
    fix = "Pass that of the layer."
    if key == "epsilon" and not (is_number(value) and 0 <= value < np.inf):
        raise error(name, describe(value), "a number from 0 up", "The usual one is 1e-5.")
    if key.startswith("use_") and not isinstance(value, (bool, np.bool_)):
        raise error(name, describe(value), "True or False", fix)
    if key == "axis" and not isinstance(value, (int, np.integer)):
        raise error(name, describe(value), "an integer", fix)


def _feature_axis(data_format: Any) -> int:
    for pattern, axis in _FORMATS.items():
        if isinstance(data_format, str) and re.fullmatch(pattern, data_format):
            return axis
    expected = "'channels_last' or 'channels_first', or letters such as 'NHWC' or 'NC...'"
    raise error("data_format", repr(data_format), expected, _NOTHING_ELSE)


def _look_up(argument: str, value: Any, known: Mapping[Any, Any]) -> Any:
    if value not in list(known):
        raise error(argument, repr(value), " or ".join(map(repr, known)), _NOTHING_ELSE)
    return known[value]
