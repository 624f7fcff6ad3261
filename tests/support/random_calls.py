"""Random calls of batch norm: every option, every kind of array, and values that no call may have."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jbn
from tests.support import reference
from tests.support.doors import DOORS

OPTIONS = {
    "momentum": [0.0, 0.5, 0.99, 1.0, None],
    "epsilon": [1e-3, 1e-5, 0.3, 0.0],
    "unbiased": [False, True],
    "debias": [False, True],
    "skip_nonfinite": [False, True],
    "virtual_batch_size": [None, None, 1, 2, 3, 4, 8],
    "renorm": [None, jbn.Renorm(1.0, 0.0), jbn.Renorm(1.5, 0.5), jbn.Renorm(np.inf, np.inf)],
    "activation": [None, "relu", jnp.tanh, jax.nn.silu],
}
# Cut in 12, the last is on more devices than one table of moments is made for.
LAYOUTS = [
    ((8, 3), -1),
    ((8, 3), 1),
    ((3, 8), 0),
    ((8, 2, 3), -1),
    ((8, 3, 2, 2), 1),
    ((4, 3, 2, 2), (1, 3)),
    ((12, 3), -1),
    ((12, 3), -1),
]
REAL = [np.float32, np.float32, jnp.bfloat16, np.float16, np.int32, np.int8]
ONE_BY_ONE = ["entries", "channels", "none", "one"]  # which may differ from channel to channel
MASKS = [None, "examples", "weights", *ONE_BY_ONE]
MODES = ["train", "evaluate", "traced train", "traced evaluate"]
# Poison lies where the mask is 0, or in one row that takes part.
POISONS = [None, "masked", "nan", "inf"]
# Of a wrong dtype the layers have Flax's own error.
WRONG = [
    ("axis", 9),
    ("axis", ()),
    ("epsilon", -1.0),
    ("epsilon", float("nan")),
    ("epsilon", "1e-3"),
    ("momentum", 1.5),
    ("momentum", "0.9"),
    ("momentum", np.ones(2, np.float32)),
    ("unbiased", 1),
    ("debias", None),
    ("skip_nonfinite", "yes"),
    ("virtual_batch_size", 0),
    ("virtual_batch_size", 2.0),
    ("virtual_batch_size", True),
    ("renorm", (1.0, 0.0)),
    ("renorm", jbn.Renorm(0.5, 0.0)),
    ("activation", "gelu"),
    ("activation", jax.nn.softmax),
    ("dtype", np.int32),
    ("mask", np.ones(5, bool)),
    ("mask", "all"),
    ("mask", np.ones(1, np.complex64)),
    ("residual", np.ones(2, np.float32)),
    ("residual", "x"),
    ("use_running_average", 1),
    ("use_running_average", np.ones(2, bool)),
]


def calls(seed):
    """One in five may have options that do not go together."""
    rng = np.random.default_rng(seed)

    def draw(values):
        return values[rng.integers(len(values))]

    shape, axis = draw(LAYOUTS)
    door = draw(list(DOORS)) if np.ndim(axis) == 0 else "core"
    is_complex = draw([False] * 5 + [True])
    batch = batch_axis(shape, axis)
    call = {
        "shape": shape,
        "axis": axis,
        "door": door,
        "x": np.complex64 if is_complex else draw(REAL),
        "dtype": draw([None, np.complex64] if is_complex else [None, None, *REAL[:4]]),
        "mask": draw(MASKS),
        "params": draw([(), ("scale",), ("bias",), ("scale", "bias")]),
        "params_like": draw(["channels", "examples", "x"]) if door == "core" else "channels",
        "batch_stats": door != "core" or draw([True] * 4 + [False]),
        "residual": draw([False, True]),
        "steps": draw([0, 1, 2, 3]),
        "poison": draw(POISONS),
        "mode": draw(MODES),
        "parts": draw([None, None, None, 1, 2, 4, *[shape[batch]] * 3]),
        "seed": seed,
        "options": {name: draw(values) for name, values in OPTIONS.items()},
        "momentum is an array": draw([False] * 3 + [True]),
        "wrong": None,
    }
    if draw([True] * 4 + [False]):
        _fit(call)
    return call


def _fit(call):
    """Without the options that do not go with the others."""
    options, examples = call["options"], call["shape"][batch_axis(call["shape"], call["axis"])]
    size = options["virtual_batch_size"]
    if size is not None and (size == 1 or examples // (call["parts"] or 1) % size):
        options["virtual_batch_size"] = None
    if options["debias"] and (call["momentum is an array"] or call["mask"] in ONE_BY_ONE):
        options["debias"] = False
    if np.complex64 in (call["x"], call["dtype"]):
        options["activation"] = None
    if call["x"] == np.complex64 or not call["batch_stats"]:
        options["renorm"] = None


def batch_axis(shape, axis):
    """The first axis that is no feature axis."""
    features = {a % len(shape) for a in np.atleast_1d(axis)}
    return min(a for a in range(len(shape)) if a not in features)


class Arrays(NamedTuple):
    """What a call is made with, in NumPy; None is none."""

    x: Any
    mask: Any
    params: dict
    residual: Any
    batch_stats: Any
    weights: Any


def arrays(call):
    rng = np.random.default_rng(call["seed"])
    shape, axis, kind = call["shape"], call["axis"], call["x"]
    features = tuple(shape[a] for a in sorted(b % len(shape) for b in np.atleast_1d(axis)))
    x = _numbers(rng, shape, kind)
    mask = _mask(call["mask"], shape, axis, rng)
    weights = None if mask is None else reference.full_weights(x, axis, mask)
    if jnp.issubdtype(kind, jnp.inexact):
        x = _poisoned(call["poison"], x, weights, axis)
    residual = _numbers(rng, shape, kind) if call["residual"] else None
    stats = None
    if call["batch_stats"]:
        stats = _batch_stats(call["steps"], features, call["options"]["momentum"], rng, kind)
        counting = call["options"]["momentum"] is None or call["options"]["debias"]
        if call["door"] != "core" and not counting:
            stats = {name: stats[name] for name in ("mean", "var")}
    return Arrays(x, mask, _params(call, features, rng), residual, stats, weights)


def _numbers(rng, shape, kind):
    values = rng.standard_normal(shape) * 2 + 1
    if jnp.issubdtype(kind, jnp.integer):
        return np.round(5 * values).astype(kind)
    if jnp.issubdtype(kind, jnp.complexfloating):
        values = values + 1j * rng.standard_normal(shape)
    return values.astype(kind)


def _poisoned(kind, x, weights, axis):
    """NaN or inf in one row that takes part and in one channel; or wherever nothing does."""
    if kind == "masked":
        return x if weights is None else np.where(weights > 0, x, np.asarray(np.nan, x.dtype))
    used = np.ones(x.shape, bool) if weights is None else weights > 0
    if kind is not None and used.any():
        x[tuple(np.argwhere(used)[0])] = {"nan": np.nan, "inf": np.inf}[kind]
    return x


def _mask(kind, shape, axis, rng):
    features, batch = {a % len(shape) for a in np.atleast_1d(axis)}, batch_axis(shape, axis)
    entries = np.arange(np.prod(shape)).reshape(shape)
    return {
        None: lambda: None,
        "examples": lambda: rng.random(shape[batch]) < 0.7,
        "entries": lambda: rng.random(shape) < 0.7,
        "channels": lambda: (
            rng.random([n if a in (batch, *features) else 1 for a, n in enumerate(shape)]) < 0.7
        ),
        "weights": lambda: (rng.integers(0, 3, shape[batch]) * rng.uniform(0.5, 1.5, shape[batch])).astype(
            np.float32
        ),
        "none": lambda: np.zeros(shape, bool),
        "one": lambda: entries == 0,
    }[kind]()


def _params(call, features, rng):
    """One value per channel, or of x's rank: for each example its own, or for each entry."""
    shape, axis = call["shape"], call["axis"]
    reduced = reference.reduced_axes(np.empty(shape), axis)
    sizes = {
        "channels": features,
        "examples": [1 if a in reduced and a != batch_axis(shape, axis) else n for a, n in enumerate(shape)],
        "x": shape,
    }[call["params_like"]]
    values = {"scale": rng.uniform(0.5, 1.5, sizes), "bias": rng.standard_normal(sizes)}
    return {name: values[name].astype(np.float32) for name in call["params"]}


def _batch_stats(steps, features, momentum, rng, kind):
    """As training leaves them: count, rows and a mean and var that may be debiased."""
    share = 1.0 if not steps else (0.0 if momentum is None else momentum**steps)
    mean, var = rng.standard_normal(features), rng.uniform(0.5, 2, features)
    stats = {"mean": (1 - share) * mean, "var": share + (1 - share) * var}
    stats = {name: value.astype(np.float32) for name, value in stats.items()}
    if jnp.issubdtype(kind, jnp.complexfloating):
        stats["mean"] = stats["mean"] * np.complex64(1 + 0.5j)
    return stats | {"count": np.int32(steps), "rows": np.full(features, 10.0 * steps, np.float32)}
