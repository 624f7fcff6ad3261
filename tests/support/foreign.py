"""Batch norms of other libraries behind one interface, converted by the lines that our docstrings show.

Each has its feature `axis`, `settings` (ours), the number of updates that it knows of, and the names of the
`rounded` arrays, which may be off by 2 units in the last place after a conversion there and back.
"""

import inspect
import os
import textwrap
import types

import jax
import numpy as np
import pytest

import jbn.tools
from jbn.tools import settings_from
from tests.support.cases import loosely

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
