"""Batch norms of Haiku and Equinox behind the interface of `foreign.py`."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jbn.tools
from jbn.tools import settings_from
from tests.support.cases import loosely
from tests.support.foreign import BIAS, DECAY, FEATURES, SCALE, SETTLED, batch, run_shown


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
