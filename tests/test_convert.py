"""Arrays and settings of other libraries' layers: carried over, evaluated and trained alike, and back."""

import inspect
import os
import textwrap
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn.linen
import jbn.nnx
from jbn.tools import _convert
from jbn.tools._convert import (
    from_equinox,
    from_haiku,
    from_keras,
    from_torch,
    settings_from,
    settings_to,
    to_equinox,
    to_haiku,
    to_keras,
    to_torch,
)
from tests.cases import assert_close, loosely

FEATURES, EVALUATION = 5, 2e-6
SCALE, BIAS = (np.random.default_rng(5).uniform(0.5, 1.5, (2, FEATURES)) - [[0], [1]]).astype(np.float32)


def batch(step, shape=(3, 2, 2, FEATURES)):
    """Small, so that the biased and the unbiased variance differ a lot; every channel its own mean."""
    x = np.random.default_rng(step).standard_normal(shape) * 2.0 + np.arange(shape[-1])
    return x.astype(np.float32)


def nchw(x):
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def shown(function):
    """The lines that the docstring shows, to be run as they stand."""
    lines = inspect.getdoc(function).split("\nArgs:")[0].splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))


def run_shown(function, replace=(), **names):
    """Runs them, and returns all names they leave."""
    source = shown(function)
    for old, new in replace:
        assert old in source
        source = source.replace(old, new)
    scope = vars(_convert) | names
    with loosely():
        exec(source, scope)
    return types.SimpleNamespace(**scope)


def assert_same(actual, expected, max_ulp=0):
    """Trees of the same structure, dtypes and bits; or within a few units in the last place."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for leaves in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        one, other = map(np.asarray, leaves)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if max_ulp:
            np.testing.assert_array_max_ulp(one, other, max_ulp)
        else:
            assert one.tobytes() == other.tobytes()


def assert_settled(batch_stats):
    """The statistics are far from where they started, so that agreement means something."""
    assert np.abs(batch_stats["mean"]).max() > 1
    assert np.abs(np.asarray(batch_stats["var"]) - 1).max() > 0.3


def evaluate(params, batch_stats, x, **settings):
    y, _ = jbn.batch_norm(params, batch_stats, x, use_running_average=True, **settings)
    return y


def train(params, batch_stats, steps, **settings):
    for step in steps:
        x = batch(step) if settings.get("axis", -1) == -1 else nchw(batch(step))
        _, batch_stats = jbn.batch_norm(params, batch_stats, x, use_running_average=False, **settings)
    return batch_stats


def core(settings):
    """Those of a layer's settings that `jbn.batch_norm` takes."""
    return {name: value for name, value in settings.items() if not name.startswith("use_")}


# PyTorch


def torch_layer(steps=6, **settings):
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm2d(FEATURES, **settings)
    with torch.no_grad():
        for name, value in (("weight", SCALE), ("bias", BIAS)):
            if getattr(layer, name) is not None:
                getattr(layer, name).copy_(torch.from_numpy(value))
    return torch_train(layer, range(steps))


def torch_train(layer, steps):
    torch = pytest.importorskip("torch")
    for step in steps:
        layer.train()(torch.from_numpy(nchw(batch(step))).to(layer.running_mean.dtype))
    return layer.eval()


TORCH = {
    "plain": {},
    "no affine": {"affine": False},
    "no bias": {"bias": False},
    "cumulative": {"momentum": None},
}


@pytest.mark.parametrize("settings", TORCH.values(), ids=TORCH)
def test_torch_there_and_back_is_the_identity(settings):
    torch, layer = pytest.importorskip("torch"), torch_layer(**settings)
    there = run_shown(from_torch, bn=layer)
    assert_settled(there.batch_stats)
    assert there.batch_stats["count"].dtype == np.int32
    assert there.batch_stats["count"] == 6
    state = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    assert_same(to_torch(there.params, there.batch_stats), state)
    assert_same(from_torch(to_torch(there.params, there.batch_stats)), (there.params, there.batch_stats))
    fresh = torch.nn.BatchNorm2d(FEATURES, **settings)
    run_shown(to_torch, bn=fresh, torch=torch, params=there.params, batch_stats=there.batch_stats)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


@pytest.mark.parametrize("settings", TORCH.values(), ids=TORCH)
def test_torch_evaluates_alike(settings):
    torch, layer, x = pytest.importorskip("torch"), torch_layer(**settings), nchw(batch(100))
    with torch.no_grad():
        expected = layer(torch.from_numpy(x)).numpy()
    y = evaluate(*from_torch(layer.state_dict()), x, axis=1, epsilon=layer.eps)
    assert_close(y, expected, EVALUATION)


def test_torch_trains_alike():
    layer = torch_layer(momentum=0.3, eps=1e-4)
    params, batch_stats = from_torch(layer.state_dict())
    settings = settings_from("torch", momentum=layer.momentum, eps=layer.eps, affine=layer.affine)
    batch_stats = train(params, batch_stats, range(50, 54), axis=1, **core(settings))
    torch_train(layer, range(50, 54))
    assert_close(batch_stats["mean"], layer.running_mean.numpy(), EVALUATION)
    assert int(batch_stats["count"]) == int(layer.num_batches_tracked) == 10


def test_torch_tensors_of_every_kind():
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        layer = torch_layer().to(torch.bfloat16)
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert tensors["weight"].requires_grad
    params, batch_stats = from_torch(tensors)
    arrays = to_torch(params, batch_stats)
    for name in ("weight", "bias", "running_mean", "running_var"):
        back = torch.from_numpy(arrays[name].view("int16")).view(torch.bfloat16)
        assert torch.equal(back, tensors[name]), name
    assert params["scale"].dtype == batch_stats["var"].dtype == jnp.bfloat16


def test_double_precision_is_kept_or_refused(x64):
    pytest.importorskip("torch")
    state = torch_layer().double().state_dict()
    params, batch_stats = from_torch(state)
    assert params["scale"].dtype == batch_stats["mean"].dtype == np.float64
    assert_same(to_torch(params, batch_stats), {name: tensor.numpy() for name, tensor in state.items()})
    with jax.enable_x64(False), pytest.raises(ValueError, match="dtype that JAX keeps"):
        from_torch(state)


def test_what_comes_over_is_a_copy():
    torch, layer = pytest.importorskip("torch"), torch_layer()
    before = jax.tree.map(np.array, from_torch(layer.state_dict()))
    converted = from_torch(layer.state_dict())
    arrays = to_torch(*converted)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.zero_()
    for array in arrays.values():
        array[...] = 0
    assert_same(converted, before)


def test_without_a_counter_there_is_none_and_torch_keeps_its_own():
    torch, layer = pytest.importorskip("torch"), torch_layer()
    state = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    del state["num_batches_tracked"]
    params, batch_stats = from_torch(state)
    assert sorted(batch_stats) == ["mean", "var"]
    assert_same(to_torch(params, batch_stats), state)
    run_shown(to_torch, bn=layer, torch=torch, params=params, batch_stats=batch_stats)
    assert layer.num_batches_tracked == 6


def test_layers_take_what_comes_over():
    torch, layer, x = pytest.importorskip("torch"), torch_layer(), batch(100)
    params, batch_stats = from_torch(layer.state_dict())
    with torch.no_grad():
        expected = np.moveaxis(layer(torch.from_numpy(nchw(x))).numpy(), 1, -1)
    settings = settings_from("torch", momentum=layer.momentum, eps=layer.eps, affine=layer.affine)
    variables = {"params": params, "batch_stats": batch_stats}
    for kind in (jbn.linen.BatchNorm, nn.BatchNorm):
        with loosely():
            y = kind(use_running_average=True, **settings).apply(variables, x)
        assert_close(y, expected, EVALUATION)
    ours = jbn.nnx.BatchNorm(FEATURES, use_running_average=True, **settings, rngs=nnx.Rngs(0))
    for name, value in {**params, "mean": batch_stats["mean"], "var": batch_stats["var"]}.items():
        getattr(ours, name)[...] = value
    assert_close(ours(x), expected, EVALUATION)


# Keras


def keras_layer(steps=6, **settings):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    layer = keras.layers.BatchNormalization(**settings)
    with loosely():
        layer.build((None, None, None, FEATURES))
        for name, value in (("gamma", SCALE), ("beta", BIAS)):
            if getattr(layer, name) is not None:
                getattr(layer, name).assign(value)
    return keras_train(layer, range(steps))


def keras_train(layer, steps):
    with loosely():
        for step in steps:
            layer(batch(step), training=True)
    return layer


KERAS = {
    "plain": {},
    "no scale": {"scale": False},
    "no center": {"center": False},
    "neither": {"scale": False, "center": False},
}


@pytest.mark.parametrize("settings", KERAS.values(), ids=KERAS)
def test_keras_there_and_back_is_the_identity(settings):
    layer = keras_layer(momentum=0.8, **settings)
    there = run_shown(from_keras, layer=layer)
    assert_settled(there.batch_stats)
    assert sorted(there.params) == ["bias"] * layer.center + ["scale"] * layer.scale
    state = {variable.name: np.asarray(variable.value) for variable in layer.weights}
    assert_same(to_keras(there.params, there.batch_stats), state)
    assert_same(from_keras(to_keras(there.params, there.batch_stats)), (there.params, there.batch_stats))
    fresh = keras_layer(steps=0, **settings)
    run_shown(to_keras, layer=fresh, params=there.params, batch_stats=there.batch_stats)
    assert_same({variable.name: np.asarray(variable.value) for variable in fresh.weights}, state)


@pytest.mark.parametrize("settings", KERAS.values(), ids=KERAS)
def test_keras_evaluates_alike(settings):
    layer, x = keras_layer(momentum=0.8, **settings), batch(100)
    params, batch_stats = from_keras({v.name: v.value for v in layer.weights})
    with loosely():
        expected = np.asarray(layer(x, training=False))
    ours = settings_from("keras", epsilon=layer.epsilon, axis=layer.axis, momentum=layer.momentum)
    assert_close(evaluate(params, batch_stats, x, **core(ours)), expected, EVALUATION)


def test_keras_trains_alike():
    layer = keras_layer(momentum=0.8)
    params, batch_stats = from_keras({v.name: v.value for v in layer.weights})
    settings = settings_from("keras", momentum=layer.momentum)
    batch_stats = train(params, batch_stats, range(50, 54), **core(settings))
    keras_train(layer, range(50, 54))
    assert_close(batch_stats["mean"], np.asarray(layer.moving_mean.value), EVALUATION)
    assert_close(batch_stats["var"], np.asarray(layer.moving_variance.value), EVALUATION)


# Haiku

DECAY, YOUNG, SETTLED = 0.8, 4, 90  # 0.8**90 is 2e-9: 1 - 0.8**90 is 1 in float32
HAIKU = {
    "plain": {"create_scale": True, "create_offset": True},
    "no scale": {"create_scale": False, "create_offset": True},
    "neither": {"create_scale": False, "create_offset": False},
    "channels first": {"create_scale": True, "create_offset": True, "data_format": "channels_first"},
}


class HaikuLayer:
    """A Haiku layer with its collections."""

    def __init__(self, steps, **settings):
        hk = pytest.importorskip("haiku")
        self.first = settings.get("data_format") == "channels_first"
        self.shape = (1, FEATURES, 1, 1) if self.first else (1, 1, 1, FEATURES)
        self.function = hk.transform_with_state(
            lambda x, train: hk.BatchNorm(decay_rate=DECAY, **settings)(x, train)  # noqa: PLW0108 - made inside
        )
        with loosely():
            self.params, self.state = self.function.init(None, self.batch(0), True)
        if "batch_norm" in self.params:
            values = {"scale": SCALE, "offset": BIAS}
            self.params["batch_norm"] = {
                name: jnp.asarray(values[name].reshape(self.shape)) for name in self.params["batch_norm"]
            }
        self.train(range(steps))

    def batch(self, step):
        return nchw(batch(step)) if self.first else batch(step)

    def train(self, steps):
        apply = jax.jit(self.function.apply, static_argnums=4)
        with loosely():
            for step in steps:
                _, self.state = apply(self.params, self.state, None, self.batch(step), True)

    def evaluate(self, x):
        with loosely():
            return self.function.apply(self.params, self.state, None, x, False)[0]


@pytest.mark.parametrize("steps", [0, YOUNG, SETTLED])
@pytest.mark.parametrize("settings", HAIKU.values(), ids=HAIKU)
def test_haiku_there_and_back_is_the_identity(settings, steps):
    layer = HaikuLayer(steps, **settings)
    there = run_shown(from_haiku, params=layer.params, state=layer.state)
    assert_settled(there.batch_stats)
    assert there.batch_stats["count"] == steps
    params, state = {"other": {}}, {}
    run_shown(
        to_haiku,
        [("decay_rate=0.9, ndim=4", f"decay_rate={DECAY}, ndim=4, axis={1 if layer.first else -1}")],
        layer_params=there.layer_params,
        batch_stats=there.batch_stats,
        params=params,
        state=state,
    )
    assert_same(params.get("batch_norm"), layer.params.get("batch_norm", {}))
    hidden = {name: [tree.pop("hidden") for tree in (state[name], layer.state[name])] for name in state}
    assert_same(state, dict(layer.state))
    for mine, theirs in hidden.values():
        assert_same(mine, theirs, max_ulp=0 if steps == SETTLED else 2)


@pytest.mark.parametrize("steps", [YOUNG, SETTLED])
def test_haiku_from_here_and_back_is_the_identity(steps):
    params = {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)}
    batch_stats = {"mean": jnp.asarray(BIAS), "var": jnp.asarray(SCALE), "count": jnp.int32(steps)}
    for ndim, axis in ((2, -1), (4, 1), (4, 3), (1, 0)):
        there = to_haiku(params, batch_stats, decay_rate=0.999, ndim=ndim, axis=axis)
        assert there[0]["scale"].ndim == ndim
        assert there[1]["average"].shape[axis] == FEATURES
        assert_same(from_haiku(*there), (params, batch_stats))


@pytest.mark.parametrize("steps", [YOUNG, SETTLED])
@pytest.mark.parametrize("settings", HAIKU.values(), ids=HAIKU)
def test_haiku_evaluates_alike(settings, steps):
    layer = HaikuLayer(steps, **settings)
    there = run_shown(from_haiku, params=layer.params, state=layer.state)
    ours = settings_from("haiku", decay_rate=DECAY, **settings)
    x = layer.batch(100)
    assert_close(
        evaluate(there.layer_params, there.batch_stats, x, **core(ours)), layer.evaluate(x), EVALUATION
    )


def test_haiku_trains_alike_once_settled():
    layer = HaikuLayer(SETTLED, **HAIKU["plain"])
    there = run_shown(from_haiku, params=layer.params, state=layer.state)
    ours = settings_from("haiku", decay_rate=DECAY, **HAIKU["plain"])
    batch_stats = train(there.layer_params, there.batch_stats, range(50, 54), **core(ours))
    layer.train(range(50, 54))
    later = run_shown(from_haiku, params=layer.params, state=layer.state).batch_stats
    assert batch_stats["count"] == later["count"]
    for name in ("mean", "var"):
        assert_close(batch_stats[name], later[name], 4e-6)  # Haiku's variance is E[x^2] - E[x]^2


# Equinox


class EquinoxLayer:
    """An Equinox layer with its State."""

    def __init__(self, steps, mode, affine=True):
        self.eqx = pytest.importorskip("equinox")
        self.bn, self.state = self.eqx.nn.make_with_state(self.eqx.nn.BatchNorm)(
            FEATURES, "batch", mode=mode, momentum=DECAY, channelwise_affine=affine
        )
        if affine:
            new = jnp.asarray(SCALE), jnp.asarray(BIAS)
            self.bn = self.eqx.tree_at(lambda bn: (bn.weight, bn.bias), self.bn, new)
        names = [("batch_state_index", "ema_state_index"), ("batch_counter", "ema_first_time_index")]
        self.taking = [*names, ("counter=", "first_time=")] if mode == "ema" else []
        self.putting = [*names, ('"counter"', '"first_time"')] if mode == "ema" else []
        self.train(range(steps))

    def apply(self, x, inference):
        def call(bn, x, state):
            return jax.vmap(
                lambda x, state: bn(x, state, inference=inference), (0, None), (0, None), axis_name="batch"
            )(x, state)

        with loosely():
            return self.eqx.filter_jit(call)(self.bn, x, self.state)

    def train(self, steps):
        for step in steps:
            _, self.state = self.apply(nchw(batch(step)), False)

    def take(self):
        return run_shown(from_equinox, self.taking, bn=self.bn, state=self.state)


EQUINOX = {"batch": ("batch", True), "ema": ("ema", True), "no affine": ("batch", False)}


@pytest.mark.parametrize("steps", [YOUNG, SETTLED])
@pytest.mark.parametrize(("mode", "affine"), EQUINOX.values(), ids=EQUINOX)
def test_equinox_there_and_back_is_the_identity(mode, affine, steps):
    layer = EquinoxLayer(steps, mode, affine)
    there = layer.take()
    assert_settled(there.batch_stats)
    assert sorted(there.params) == ["bias", "scale"] * affine
    assert there.batch_stats.get("count") == (steps if mode == "batch" else None)
    fresh = EquinoxLayer(0, mode, affine)
    back = run_shown(
        to_equinox,
        fresh.putting,
        eqx=fresh.eqx,
        bn=fresh.bn,
        state=fresh.state,
        params=there.params,
        batch_stats=there.batch_stats,
    )
    exact = mode == "ema" or steps == SETTLED
    for name in ("weight", "bias"):
        assert_same(getattr(back.bn, name), getattr(layer.bn, name))
    assert jax.tree.structure(back.state) == jax.tree.structure(layer.state)
    for mine, theirs in zip(jax.tree.leaves(back.state), jax.tree.leaves(layer.state), strict=True):
        assert mine.weak_type == theirs.weak_type
        assert_same(mine, theirs, max_ulp=2 * (not exact and mine.ndim))
    again = from_equinox(back.arrays, momentum=DECAY)
    assert_same(again[0], there.params)
    assert_same(again[1], there.batch_stats, max_ulp=0 if exact else 2)


@pytest.mark.parametrize("steps", [YOUNG, SETTLED])
@pytest.mark.parametrize(("mode", "affine"), EQUINOX.values(), ids=EQUINOX)
def test_equinox_evaluates_alike(mode, affine, steps):
    layer, x = EquinoxLayer(steps, mode, affine), nchw(batch(100))
    there = layer.take()
    y = evaluate(there.params, there.batch_stats, x, axis=1, epsilon=layer.bn.eps)
    assert_close(y, layer.apply(x, True)[0], EVALUATION)


def test_equinox_evaluates_alike_before_the_first_update():
    layer, x = EquinoxLayer(0, "batch"), nchw(batch(100))
    there = layer.take()
    assert_close(evaluate(there.params, there.batch_stats, x, axis=1), layer.apply(x, True)[0], EVALUATION)
    assert_same(to_equinox(there.params, there.batch_stats, momentum=DECAY), there.arrays)


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_equinox_trains_alike_once_settled(mode):
    layer = EquinoxLayer(SETTLED, mode)
    there = layer.take()
    ours = settings_from("equinox", axis_name="batch", mode="batch", momentum=DECAY) | {"axis_name": None}
    batch_stats = train(there.params, there.batch_stats, range(50, 54), axis=1, **core(ours))
    layer.train(range(50, 54))
    later = layer.take().batch_stats
    for name in ("mean", "var"):
        assert_close(batch_stats[name], later[name], 4e-6)
    assert batch_stats.get("count") == later.get("count")


# Settings

SETTINGS = {
    "torch": (
        "torch",
        {"momentum": 0.1, "eps": 1e-5, "affine": True},
        {"momentum": 0.9, "epsilon": 1e-5, "use_scale": True, "use_bias": True},
    ),
    "torch, cumulative": (
        "torch",
        {"momentum": None, "eps": 1e-3, "affine": False},
        {"momentum": None, "epsilon": 1e-3, "use_scale": False, "use_bias": False},
    ),
    "torch, no bias": (
        "torch",
        {"momentum": 0.0, "eps": 0.0, "affine": True, "bias": False},
        {"momentum": 1.0, "epsilon": 0.0, "use_scale": True, "use_bias": False},
    ),
    "keras": (
        "keras",
        {"axis": 1, "momentum": 0.9, "epsilon": 1e-3, "scale": False, "center": True},
        {"axis": 1, "momentum": 0.9, "epsilon": 1e-3, "use_scale": False, "use_bias": True},
    ),
    "haiku": (
        "haiku",
        {
            "data_format": "channels_first",
            "decay_rate": 0.9,
            "eps": 1e-4,
            "create_scale": True,
            "create_offset": False,
            "cross_replica_axis": "data",
            "cross_replica_axis_index_groups": [[0, 1], [2, 3]],
        },
        {
            "axis": 1,
            "momentum": 0.9,
            "epsilon": 1e-4,
            "use_scale": True,
            "use_bias": False,
            "axis_name": "data",
            "axis_index_groups": [[0, 1], [2, 3]],
        },
    ),
    "equinox": (
        "equinox",
        {"axis_name": "batch", "momentum": 0.9, "eps": 1e-4, "channelwise_affine": False, "mode": "batch"},
        {"axis_name": "batch", "momentum": 0.9, "epsilon": 1e-4, "use_scale": False, "use_bias": False},
    ),
}


@pytest.mark.parametrize(("library", "theirs", "ours"), SETTINGS.values(), ids=SETTINGS)
def test_settings_there_and_back(library, theirs, ours):
    assert settings_from(library, **theirs) == ours
    assert settings_to(library, **ours) == theirs


@pytest.mark.parametrize(("library", "theirs", "ours"), SETTINGS.values(), ids=SETTINGS)
def test_layers_take_the_settings(library, theirs, ours):
    fields = set(jbn.linen.BatchNorm.__dataclass_fields__)
    assert set(settings_from(library, **theirs)) <= fields


@pytest.mark.parametrize("rate", [0.1, 0.9, 0.01, 0.3, 0.003, 1e-9, 0.7, 1.0, 0, np.float32(0.1)])
def test_rates_come_back_as_they_were(rate):
    decay = settings_from("torch", momentum=rate)["momentum"]
    assert type(decay) is float
    assert settings_to("torch", momentum=decay)["momentum"] == float(str(rate))


def layer_classes():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    return {
        "torch": lambda: pytest.importorskip("torch").nn.BatchNorm2d,
        "keras": lambda: pytest.importorskip("keras").layers.BatchNormalization,
        "haiku": lambda: pytest.importorskip("haiku").BatchNorm,
        "equinox": lambda: pytest.importorskip("equinox").nn.BatchNorm,
    }


@pytest.mark.parametrize("library", ["torch", "keras", "haiku", "equinox"])
def test_defaults_are_those_of_the_library(library):
    theirs = inspect.signature(layer_classes()[library]().__init__).parameters
    for name, (_, default) in _convert._SETTINGS[library].items():
        if (library, name) == ("torch", "bias") and name not in theirs:
            continue  # older versions
        expected = theirs[name].default
        if (library, name) == ("equinox", "mode"):
            assert (expected, default) == ("legacy", ...)  # which warns: the mode has to be said
        else:
            assert default == (... if expected is inspect.Parameter.empty else expected), name


def test_our_defaults_are_those_of_the_layer():
    fields = jbn.linen.BatchNorm.__dataclass_fields__
    for library, required in (("torch", {}), ("keras", {}), ("haiku", {}), ("equinox", {"axis_name": "b"})):
        for name, value in settings_from(library, **settings_to(library, **required)).items():
            assert value == required.get(name, fields[name].default), name


def test_a_copied_rate_would_be_wrong():
    """Five batches of variance 1.25, from 1: 1.1024 with decay 0.9; 1.25 if PyTorch's 0.1 were the decay."""
    x = np.tile(np.float32([0, 1, 2, 3]), 1000)[:, None]
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm1d(1, momentum=0.1)
    right, copied = jbn.init(1)[1], jbn.init(1)[1]
    for _ in range(5):
        layer(torch.from_numpy(x))
        right, copied = (
            jbn.batch_norm({}, stats, x, use_running_average=False, momentum=momentum)[1]
            for stats, momentum in ((right, settings_from("torch", momentum=0.1)["momentum"]), (copied, 0.1))
        )
    assert_close(right["var"], np.float32([1.10238]), 1e-5)
    assert_close(right["mean"], layer.running_mean.numpy(), EVALUATION)
    assert_close(right["var"], layer.running_var.numpy(), 2e-4)  # theirs is unbiased: 4000 / 3999
    assert_close(copied["var"], np.float32([1.25]), 1e-4)


# Errors

VECTOR, COUNTER = np.zeros(3, np.float32), np.array(4)
STATE = {"weight": VECTOR, "bias": VECTOR, "running_mean": VECTOR, "running_var": VECTOR}
EMA = {"hidden": VECTOR, "average": VECTOR, "counter": COUNTER}
PARAMS, STATS = jbn.init(3)
COUNTED = {**STATS, "count": jnp.int32(4)}
BN = "Pass bn.state_dict() of one batch norm; one with track_running_stats=False has no statistics."
COLLECTIONS = "Pass the collections of one layer, for example variables['params']['BatchNorm_0']."
TAKE = "The docstring of from_equinox shows how to take them out of a layer and its State."
LEAVE = "Leave out what has no counterpart, once you know that nothing is lost with it."
TEXTS = {
    "no mapping": (
        lambda: from_torch([VECTOR]),
        "jbn.tools.from_torch: state is [array([0., 0., 0.], dtype=float32)]. Expected a mapping with weight, bias, "
        f"running_mean, running_var, num_batches_tracked. {BN}",
    ),
    "no statistics": (
        lambda: from_torch({"weight": VECTOR, "bias": VECTOR}),
        "jbn.tools.from_torch: state is a mapping without running_mean, running_var. Expected running_mean, "
        f"running_var, and perhaps weight, bias, num_batches_tracked. {BN}",
    ),
    "unknown and missing": (
        lambda: from_torch({"gamma": VECTOR, "beta": VECTOR, "running_mean": VECTOR}),
        "jbn.tools.from_torch: state is a mapping with the unknown gamma, beta and without running_var. Expected "
        f"running_mean, running_var, and perhaps weight, bias, num_batches_tracked. {BN}",
    ),
    "another size": (
        lambda: from_torch(STATE | {"bias": np.zeros(4, np.float32)}),
        "jbn.tools.from_torch: state['bias'] is float32[4]. Expected floats of shape (3,), one per channel. "
        + BN,
    ),
    "two axes": (
        lambda: from_torch(dict.fromkeys(STATE, np.zeros((1, 3), np.float32))),
        "jbn.tools.from_torch: state['weight'] is float32[1,3]. Expected floats of shape (3,), one per channel. "
        + BN,
    ),
    "integers": (
        lambda: from_torch(STATE | {"running_var": np.ones(3, np.int32)}),
        "jbn.tools.from_torch: state['running_var'] is int32[3]. Expected floats of shape (3,), one per channel. "
        + BN,
    ),
    "double precision": (
        lambda: from_torch(STATE | {"running_var": np.ones(3)}),
        "jbn.tools.from_torch: state['running_var'] is float64[3]. Expected a dtype that JAX keeps. Cast it to "
        "float32, or enable jax_enable_x64.",
    ),
    "a counter beyond int32": (
        lambda: from_torch(STATE | {"num_batches_tracked": np.array(2**31)}),
        "jbn.tools.from_torch: state['num_batches_tracked'] is int64[] of value 2147483648. Expected one integer "
        f"from 0 to 2147483647. {BN}",
    ),
    "a counter per channel": (
        lambda: to_torch(PARAMS, {**STATS, "count": jnp.zeros(3, jnp.int32)}),
        "jbn.tools.to_torch: batch_stats['count'] is int32[3]. Expected one integer from 0 to 2147483647. "
        + COLLECTIONS,
    ),
    "a bias alone, torch": (
        lambda: to_torch({"bias": PARAMS["bias"]}, STATS),
        "jbn.tools.to_torch: params is a bias without a scale. Expected a bias only beside a scale. Add a "
        "scale of ones, which changes nothing.",
    ),
    "rows": (
        lambda: to_torch(PARAMS, jbn.init(3, count=True)[1]),
        "jbn.tools.to_torch: batch_stats is a mapping with the unknown rows. Expected mean, var, and perhaps count. "
        + COLLECTIONS,
    ),
    "params of a model": (
        lambda: to_torch({"BatchNorm_0": PARAMS}, STATS),
        "jbn.tools.to_torch: params is a mapping with the unknown BatchNorm_0. Expected perhaps scale, bias. "
        + COLLECTIONS,
    ),
    "params of another size": (
        lambda: to_torch(jbn.init(4)[0], STATS),
        "jbn.tools.to_torch: params['scale'] is float32[4]. Expected floats of shape (3,), one per channel. "
        + COLLECTIONS,
    ),
    "no batch_stats": (
        lambda: to_torch(PARAMS, None),
        f"jbn.tools.to_torch: batch_stats is None. Expected a mapping with mean, var, count. {COLLECTIONS}",
    ),
    "renorm": (
        lambda: from_keras({"moving_mean": VECTOR, "moving_variance": VECTOR, "renorm_mean": VECTOR}),
        "jbn.tools.from_keras: state is a mapping with the unknown renorm_mean. Expected moving_mean, moving_variance, "
        "and perhaps gamma, beta. Pass {v.name: v.value for v in layer.weights} of one BatchNormalization without "
        "renorm.",
    ),
    "a count for Keras": (
        lambda: to_keras(PARAMS, COUNTED),
        "jbn.tools.to_keras: batch_stats is a mapping with the unknown count. Expected mean, var. Pass the collections "
        "of one layer, without its count: Keras keeps none.",
    ),
    "half a moving average": (
        lambda: from_haiku({}, EMA, {"average": VECTOR}),
        "jbn.tools.from_haiku: var_ema is a mapping without hidden, counter. Expected hidden, average, counter. Pass "
        "params['batch_norm'], state['batch_norm/~/mean_ema'] and state['batch_norm/~/var_ema'].",
    ),
    "foreign Haiku parameters": (
        lambda: from_haiku({"w": VECTOR}, EMA, EMA),
        "jbn.tools.from_haiku: params is a mapping with the unknown w. Expected perhaps scale, offset. Pass "
        "params['batch_norm'], state['batch_norm/~/mean_ema'] and state['batch_norm/~/var_ema'].",
    ),
    "different counters": (
        lambda: from_haiku({}, EMA, EMA | {"counter": np.array(5)}),
        "jbn.tools.from_haiku: var_ema['counter'] is 5. Expected that of mean_ema, 4. Pass params['batch_norm'], "
        "state['batch_norm/~/mean_ema'] and state['batch_norm/~/var_ema'].",
    ),
    "several feature axes": (
        lambda: from_haiku({}, EMA | {"average": np.zeros((1, 2, 3), np.float32)}, EMA),
        "jbn.tools.from_haiku: mean_ema['average'] is float32[1,2,3]. Expected floats of shape (6,), one per channel. "
        "Pass params['batch_norm'], state['batch_norm/~/mean_ema'] and state['batch_norm/~/var_ema'].",
    ),
    "no count for Haiku": (
        lambda: to_haiku(PARAMS, STATS, decay_rate=0.9, ndim=2),
        "jbn.tools.to_haiku: batch_stats is a mapping without count. Expected mean, var, count. Pass one layer's, with "
        "the number of updates: {**batch_stats, 'count': jnp.int32(updates)}.",
    ),
    "a decay rate of 1": (
        lambda: to_haiku(PARAMS, COUNTED, decay_rate=1, ndim=2),
        "jbn.tools.to_haiku: decay_rate is 1. Expected a number from 0 up and below 1. Pass that of the layer.",
    ),
    "an axis that is none": (
        lambda: to_haiku(PARAMS, COUNTED, decay_rate=0.9, ndim=2, axis=2),
        "jbn.tools.to_haiku: axis is 2 with ndim=2. Expected an axis of the layer's inputs. For NHWC pass ndim=4 and "
        "axis=-1, for NCHW ndim=4 and axis=1.",
    ),
    "neither counter nor first_time": (
        lambda: from_equinox({"mean": VECTOR, "var": VECTOR}, momentum=0.9),
        "jbn.tools.from_equinox: state is a mapping without counter. Expected mean, var, counter, and perhaps weight, "
        f"bias. {TAKE}",
    ),
    "counter and first_time": (
        lambda: from_equinox(
            {"mean": VECTOR, "var": VECTOR, "counter": COUNTER, "first_time": False}, momentum=0.9
        ),
        "jbn.tools.from_equinox: state is a mapping with the unknown counter. Expected mean, var, first_time, and "
        f"perhaps weight, bias. {TAKE}",
    ),
    "before the first batch": (
        lambda: from_equinox({"mean": VECTOR, "var": VECTOR, "first_time": jnp.array(True)}, momentum=0.9),
        "jbn.tools.from_equinox: state['first_time'] is True. Expected a layer that has seen a batch. Before the first "
        "batch a layer in mode='ema' has no statistics: start from jbn.init.",
    ),
    "a momentum of None": (
        lambda: from_equinox({"mean": VECTOR, "var": VECTOR, "counter": COUNTER}, momentum=None),
        "jbn.tools.from_equinox: momentum is None. Expected a number from 0 up and below 1. Pass that of the layer.",
    ),
    "a scale alone, equinox": (
        lambda: to_equinox({"scale": PARAMS["scale"]}, STATS, momentum=0.9),
        "jbn.tools.to_equinox: params is a scale without a bias. Expected a scale only beside a bias. Add a "
        "bias of zeros, which changes nothing.",
    ),
    "an unknown library": (
        lambda: settings_from("tensorflow"),
        "jbn.tools.settings_from: library is 'tensorflow'. Expected torch, keras, haiku, equinox. Name one of these.",
    ),
    "settings without a counterpart": (
        lambda: settings_from("torch", num_features=3, eps=1e-5, track_running_stats=False),
        "jbn.tools.settings_from: theirs is a mapping with the unknown num_features, track_running_stats. Expected "
        f"perhaps momentum, eps, affine, bias. {LEAVE}",
    ),
    "settings that are missing": (
        lambda: settings_from("haiku", axis=[0, 1]),
        "jbn.tools.settings_from: theirs is a mapping with the unknown axis and without decay_rate, create_scale, "
        "create_offset. Expected decay_rate, create_scale, create_offset, and perhaps data_format, eps, "
        f"cross_replica_axis, cross_replica_axis_index_groups. {LEAVE}",
    ),
    "our settings without a counterpart": (
        lambda: settings_to("keras", axis_name="data", dtype=None),
        "jbn.tools.settings_to: ours is a mapping with the unknown axis_name, dtype. Expected perhaps axis, epsilon, "
        f"momentum, use_bias, use_scale. {LEAVE}",
    ),
    "a mode without a counterpart": (
        lambda: settings_from("equinox", axis_name="batch", mode="ema"),
        "jbn.tools.settings_from: mode is 'ema'. Expected 'batch'. Anything else has no counterpart.",
    ),
    "an axis that Haiku cannot name": (
        lambda: settings_to("haiku", axis=2),
        "jbn.tools.settings_to: axis is 2. Expected -1 or 1. Anything else has no counterpart.",
    ),
    "a rate above 1": (
        lambda: settings_from("torch", momentum=1.5),
        "jbn.tools.settings_from: momentum is 1.5. Expected a number from 0 to 1. Schedules have no counterpart, and "
        "None, the cumulative average, is for torch only.",
    ),
    "cumulative outside torch": (
        lambda: settings_to("keras", momentum=None),
        "jbn.tools.settings_to: momentum is None. Expected a number from 0 to 1. Schedules have no counterpart, and "
        "None, the cumulative average, is for torch only.",
    ),
    "a bias alone in the settings": (
        lambda: settings_to("torch", use_scale=False),
        "jbn.tools.settings_to: ours is a bias without a scale. Expected a bias only beside a scale. Add a "
        "scale of ones, which changes nothing.",
    ),
}
