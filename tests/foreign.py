"""Batch norms of other libraries behind one interface, converted by the lines that our docstrings show.

Each has its feature `axis`, `settings` (ours), the number of updates that it knows of, and the names of the
`rounded` arrays, which may be off by 2 units in the last place after a conversion there and back.
"""

import functools
import inspect
import os
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn.tools
from jbn.tools import settings_from
from tests.cases import loosely

FEATURES, EVALUATION = 5, 2e-6
SCALE, BIAS = (np.random.default_rng(5).uniform(0.5, 1.5, (2, FEATURES)) - [[0], [1]]).astype(np.float32)
DECAY, SOME, YOUNG, SETTLED = 0.8, 6, 4, 90  # 0.8**90 is 2e-9: 1 - 0.8**90 is 1 in float32


def batch(step, axis=-1):
    """Small, so that the biased and the unbiased variance differ a lot; every channel its own mean."""
    x = np.random.default_rng(step).standard_normal((3, 2, 2, FEATURES)) * 2.0 + np.arange(FEATURES)
    return np.ascontiguousarray(np.moveaxis(x.astype(np.float32), -1, axis))


def run_shown(function, replace=(), **names):
    """Runs the lines that the docstring shows, as they stand, and returns all names that they leave."""
    lines = inspect.getdoc(function).split("\nArgs:")[0].splitlines()
    source = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
    for old, new in replace:
        assert old in source
        source = source.replace(old, new)
    scope = vars(jbn.tools) | names
    with loosely():
        exec(source, scope)
    return types.SimpleNamespace(**scope)


def assert_same(actual, expected, rounded=()):
    """Trees of the same structure, dtypes and bits; or, by name, within 2 units in the last place."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, leaf), wanted in pairs:
        assert getattr(leaf, "weak_type", False) == getattr(wanted, "weak_type", False), path
        one, other = np.asarray(leaf), np.asarray(wanted)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        if path and getattr(path[-1], "key", None) in rounded:
            np.testing.assert_array_max_ulp(one, other, 2)
        else:
            assert one.tobytes() == other.tobytes(), path


class Torch:
    """BatchNorm2d."""

    axis, rounded = 1, ()

    def __init__(self, steps, **settings):
        self.torch = pytest.importorskip("torch")
        self.bn, self.updates = self.torch.nn.BatchNorm2d(FEATURES, **settings), steps
        with self.torch.no_grad():
            for name, value in (("weight", SCALE), ("bias", BIAS)):
                if getattr(self.bn, name) is not None:
                    getattr(self.bn, name).copy_(self.torch.from_numpy(value))
        self.train(range(steps))

    @property
    def settings(self):
        given = {name: getattr(self.bn, name) for name in ("momentum", "eps", "affine")}
        return settings_from("torch", **given, bias=self.bn.bias is not None)

    @property
    def arrays(self):
        return {name: tensor.numpy() for name, tensor in self.bn.state_dict().items()}

    def train(self, steps):
        for step in steps:
            self.bn.train()(self.torch.from_numpy(batch(step, self.axis)))
        self.bn.eval()

    def evaluate(self, x):
        with self.torch.no_grad():
            return self.bn(self.torch.from_numpy(x)).numpy()

    def take(self):
        found = run_shown(jbn.tools.from_torch, bn=self.bn)
        return found.params, found.batch_stats

    def put(self, params, batch_stats):
        names = {"bn": self.bn, "torch": self.torch, "params": params, "batch_stats": batch_stats}
        return run_shown(jbn.tools.to_torch, **names).arrays


class Keras:
    """BatchNormalization."""

    axis, rounded, updates = -1, (), None

    def __init__(self, steps, **settings):
        os.environ.setdefault("KERAS_BACKEND", "jax")
        keras = pytest.importorskip("keras")
        self.layer = keras.layers.BatchNormalization(momentum=DECAY, **settings)
        with loosely():
            self.layer.build((None, None, None, FEATURES))
            for name, value in (("gamma", SCALE), ("beta", BIAS)):
                if getattr(self.layer, name) is not None:
                    getattr(self.layer, name).assign(value)
        self.train(range(steps))

    @property
    def settings(self):
        names = ("axis", "momentum", "epsilon", "scale", "center")
        return settings_from("keras", **{name: getattr(self.layer, name) for name in names})

    @property
    def arrays(self):
        return {variable.name: np.asarray(variable.value) for variable in self.layer.weights}

    def train(self, steps):
        with loosely():
            for step in steps:
                self.layer(batch(step), training=True)

    def evaluate(self, x):
        with loosely():
            return np.asarray(self.layer(x, training=False))

    def take(self):
        found = run_shown(jbn.tools.from_keras, layer=self.layer)
        return found.params, found.batch_stats

    def put(self, params, batch_stats):
        names = {"layer": self.layer, "params": params, "batch_stats": batch_stats}
        return run_shown(jbn.tools.to_keras, **names).arrays


class Haiku:
    """BatchNorm with its collections."""

    def __init__(self, steps, create_scale=True, create_offset=True, **settings):
        hk = pytest.importorskip("haiku")
        given = {
            "decay_rate": DECAY,
            "create_scale": create_scale,
            "create_offset": create_offset,
            **settings,
        }
        self.settings, self.updates = settings_from("haiku", **given), steps
        self.axis, self.rounded = self.settings["axis"], () if steps == SETTLED else ("hidden",)
        self.function = hk.transform_with_state(
            lambda x, train: hk.BatchNorm(**given)(x, train)  # noqa: PLW0108 - made inside
        )
        self.apply = jax.jit(self.function.apply, static_argnums=4)
        with loosely():
            self.params, self.state = self.function.init(None, batch(0, self.axis), True)
        for name in self.params.get("batch_norm", {}):
            value = {"scale": SCALE, "offset": BIAS}[name]
            shape = self.params["batch_norm"][name].shape
            self.params["batch_norm"][name] = jnp.asarray(value.reshape(shape))
        self.train(range(steps))

    @property
    def arrays(self):
        emas = (self.state[f"batch_norm/~/{name}"] for name in ("mean_ema", "var_ema"))
        return [self.params.get("batch_norm", {}), *emas]

    def train(self, steps):
        with loosely():
            for step in steps:
                _, self.state = self.apply(self.params, self.state, None, batch(step, self.axis), True)

    def evaluate(self, x):
        with loosely():
            return self.apply(self.params, self.state, None, x, False)[0]

    def take(self):
        found = run_shown(jbn.tools.from_haiku, params=self.params, state=self.state)
        return found.layer_params, found.batch_stats

    def put(self, params, batch_stats):
        settings = [("decay_rate=0.9, ndim=4", f"decay_rate={DECAY}, ndim=4, axis={self.axis}")]
        self.params, self.state = {"other": {}}, {}
        names = {"params": self.params, "state": self.state}
        run_shown(jbn.tools.to_haiku, settings, layer_params=params, batch_stats=batch_stats, **names)
        return self.arrays


class Equinox:
    """BatchNorm with its State."""

    axis = 1

    def __init__(self, steps, mode="batch", affine=True):
        self.eqx, self.mode = pytest.importorskip("equinox"), mode
        self.bn, self.state = self.eqx.nn.make_with_state(self.eqx.nn.BatchNorm)(
            FEATURES, "batch", mode=mode, momentum=DECAY, channelwise_affine=affine
        )
        if affine:
            new = jnp.asarray(SCALE), jnp.asarray(BIAS)
            self.bn = self.eqx.tree_at(lambda bn: (bn.weight, bn.bias), self.bn, new)
        self.updates = steps if mode == "batch" else None
        self.rounded = ("mean", "var") if mode == "batch" and steps != SETTLED else ()
        self.train(range(steps))

    @property
    def settings(self):
        given = {name: getattr(self.bn, name) for name in ("momentum", "eps", "channelwise_affine")}
        return settings_from("equinox", **given, mode="batch", axis_name="batch") | {"axis_name": None}

    @property
    def arrays(self):
        return self.taken().arrays

    def train(self, steps):
        for step in steps:
            _, self.state = self.apply(batch(step, self.axis), False)

    def evaluate(self, x):
        return self.apply(x, True)[0]

    def apply(self, x, inference):
        with loosely():
            return compiled_equinox(self.eqx)(self.bn, x, self.state, inference)

    def shown_for_mode(self, counter, first_time):
        """The lines are for mode="batch", and say what to put in for mode="ema"."""
        names = [("batch_state_index", "ema_state_index"), ("batch_counter", "ema_first_time_index")]
        return [*names, (counter, first_time)] if self.mode == "ema" else []

    def taken(self):
        replace = self.shown_for_mode("counter=", "first_time=")
        return run_shown(jbn.tools.from_equinox, replace, bn=self.bn, state=self.state)

    def take(self):
        found = self.taken()
        return found.params, found.batch_stats

    def put(self, params, batch_stats):
        replace, before = self.shown_for_mode('"counter"', '"first_time"'), jax.tree.structure(self.state)
        names = {"params": params, "batch_stats": batch_stats, "state": self.state}
        found = run_shown(jbn.tools.to_equinox, replace, eqx=self.eqx, bn=self.bn, **names)
        self.bn, self.state = found.bn, found.state
        assert jax.tree.structure(self.state) == before
        return found.arrays


@functools.cache
def compiled_equinox(eqx):
    """Once for all layers: a function made anew would be compiled anew."""

    def call(bn, x, state, inference):
        one = lambda x, state: bn(x, state, inference=inference)  # noqa: E731
        return jax.vmap(one, (0, None), (0, None), axis_name="batch")(x, state)

    return eqx.filter_jit(call)
