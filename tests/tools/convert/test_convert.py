"""Arrays of other libraries' layers: evaluated and trained alike here, and carried back bit for bit."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn.tools import from_haiku, to_equinox, to_haiku
from tests.support.cases import assert_close
from tests.support.foreign import (
    BIAS,
    DECAY,
    EVALUATION,
    FEATURES,
    SCALE,
    SETTLED,
    SOME,
    YOUNG,
    Keras,
    Torch,
    assert_same,
    batch,
)
from tests.support.foreign_jax import Equinox, Haiku

LAYERS = {  # how a layer is made, and after how many updates it is converted
    "torch": (Torch, [SOME]),
    "torch, no affine": (functools.partial(Torch, affine=False), [SOME]),
    "torch, no bias": (functools.partial(Torch, bias=False), [SOME]),
    "torch, cumulative": (functools.partial(Torch, momentum=None), [SOME]),
    "keras": (Keras, [SOME]),
    "keras, no scale": (functools.partial(Keras, scale=False), [SOME]),
    "keras, no center": (functools.partial(Keras, center=False), [SOME]),
    "keras, neither": (functools.partial(Keras, scale=False, center=False), [SOME]),
    "haiku": (Haiku, [0, YOUNG, SETTLED]),
    "haiku, no scale": (functools.partial(Haiku, create_scale=False), [0, YOUNG, SETTLED]),
    "haiku, neither": (
        functools.partial(Haiku, create_scale=False, create_offset=False),
        [0, YOUNG, SETTLED],
    ),
    "haiku, channels first": (functools.partial(Haiku, data_format="channels_first"), [0, YOUNG, SETTLED]),
    "equinox": (Equinox, [YOUNG, SETTLED]),
    "equinox, ema": (functools.partial(Equinox, mode="ema"), [YOUNG, SETTLED]),
    "equinox, no affine": (functools.partial(Equinox, affine=False), [YOUNG, SETTLED]),
}
CASES = [
    pytest.param(make, steps, id=f"{name}, {steps} updates")
    for name, (make, all_steps) in LAYERS.items()
    for steps in all_steps
]


def assert_evaluates_alike(layer):
    params, batch_stats = layer.take()
    x, settings = batch(100, layer.axis), {"epsilon": layer.settings["epsilon"], "axis": layer.axis}
    y, _ = jbn.batch_norm(params, batch_stats, x, use_running_average=True, **settings)
    assert_close(y, layer.evaluate(x), EVALUATION)


@pytest.mark.parametrize(("make", "steps"), CASES)
def test_there_and_back_is_the_identity(make, steps):
    layer = make(steps)
    params, batch_stats = layer.take()
    # Far from where statistics start, so that agreement means something.
    assert np.abs(batch_stats["mean"]).max() > 1
    assert np.abs(np.asarray(batch_stats["var"]) - 1).max() > 0.3
    assert set(params) == {name for name in ("scale", "bias") if layer.settings[f"use_{name}"]}
    assert batch_stats.get("count") == layer.updates
    assert layer.updates is None or batch_stats["count"].dtype == np.int32
    fresh = make(0)
    assert_same(fresh.put(params, batch_stats), layer.arrays, layer.rounded)
    assert_same(fresh.arrays, layer.arrays, layer.rounded)
    assert_same(fresh.take(), (params, batch_stats), layer.rounded)


@pytest.mark.parametrize(("make", "steps"), CASES)
def test_it_evaluates_alike(make, steps):
    assert_evaluates_alike(make(steps))


def test_equinox_before_the_first_update():
    layer = Equinox(0)
    assert_evaluates_alike(layer)
    assert_same(to_equinox(*layer.take(), momentum=DECAY), layer.arrays)


TRAINED = {  # after how many updates, what agrees from there on, and how well
    # PyTorch's variance is unbiased.
    "torch": (functools.partial(Torch, momentum=0.3, eps=1e-4), SOME, ["mean"], EVALUATION),
    "keras": (Keras, SOME, ["mean", "var"], EVALUATION),
    # Haiku's variance is E[x^2] - E[x]^2.
    "haiku": (Haiku, SETTLED, ["mean", "var"], 4e-6),
    "equinox": (Equinox, SETTLED, ["mean", "var"], 4e-6),
    "equinox, ema": (functools.partial(Equinox, mode="ema"), SETTLED, ["mean", "var"], 4e-6),
}


@pytest.mark.parametrize(("make", "steps", "names", "accuracy"), TRAINED.values(), ids=TRAINED)
def test_it_trains_alike(make, steps, names, accuracy):
    layer, more = make(steps), range(50, 54)
    params, batch_stats = layer.take()
    core = {name: value for name, value in layer.settings.items() if not name.startswith("use_")}
    core["axis"] = layer.axis
    for step in more:
        x = batch(step, layer.axis)
        _, batch_stats = jbn.batch_norm(params, batch_stats, x, use_running_average=False, **core)
    layer.train(more)
    _, later = layer.take()
    for name in names:
        assert_close(batch_stats[name], later[name], accuracy)
    assert batch_stats.get("count") == later.get("count") == (None if layer.updates is None else steps + 4)


@pytest.mark.parametrize("steps", [YOUNG, SETTLED])
def test_from_here_to_haiku_and_back_is_the_identity(steps):
    params = {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)}
    batch_stats = {"mean": jnp.asarray(BIAS), "var": jnp.asarray(SCALE), "count": jnp.int32(steps)}
    for ndim, axis in ((2, -1), (4, 1), (4, 3), (1, 0)):
        there = to_haiku(params, batch_stats, decay_rate=0.999, ndim=ndim, axis=axis)
        assert there[0]["scale"].ndim == ndim
        assert there[1]["average"].shape[axis] == FEATURES
        assert_same(from_haiku(*there), (params, batch_stats))
