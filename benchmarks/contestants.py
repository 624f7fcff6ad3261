"""The batch norm layers of each JAX library, behind one interface.

Each is set up as its own documentation says: momentum 0.9, epsilon 1e-5, scale and bias, features last. The
dtype is that of x and y. Parameters and statistics are in float32, but for Haiku, which makes them in x's.
"""

import dataclasses
import functools
import importlib.util
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MOMENTUM, EPSILON = 0.9, 1e-5
LAYERS = "BENCHMARKS_LAYERS"  # names, as JSON; all if there are none


@dataclasses.dataclass(frozen=True)
class Layer:
    """`apply(params, state, x, residual=None, relu=False)` returns y and the new state.

    That of linen's layers takes a `mask` too.
    """

    params: Any
    state: Any
    apply: Callable[..., tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a layer is made for: the shape and dtype of x, the mode, the mapped axis."""

    shape: tuple[int, ...]
    dtype: Any = jnp.float32
    training: bool = True
    axis_name: str | None = None

    def one_row(self):
        """The smallest x of that rank, for layers that look at one to make their variables."""
        return jnp.zeros((2, *[1] * (len(self.shape) - 2), self.shape[-1]), self.dtype)


@dataclasses.dataclass(frozen=True)
class Contestant:
    name: str
    needs: str  # the package it is from
    make: Callable[[Setting], Layer]
    inside: bool = False  # whether relu and residual are part of the layer

    def installed(self):
        return importlib.util.find_spec(self.needs) is not None


def outside(plain):
    """Residual and relu added behind a layer that has neither."""

    def apply(params, state, x, residual=None, relu=False, **options):
        y, state = plain(params, state, x, **options)
        y = y.astype(x.dtype)
        y = y if residual is None else y + residual
        return (jax.nn.relu(y) if relu else y), state

    return apply


def linen(setting, make, inside=False):
    options = {
        "momentum": MOMENTUM,
        "epsilon": EPSILON,
        "dtype": setting.dtype,
        "axis_name": setting.axis_name,
    }
    make = functools.partial(make, use_running_average=not setting.training, **options)

    def variables(params, state):
        return {"params": params, "batch_stats": state}

    def plain(params, state, x, mask=None):
        y, new = make().apply(variables(params, state), x, mask=mask, mutable=["batch_stats"])
        return y, new["batch_stats"]

    def fused(params, state, x, residual=None, relu=False, mask=None):
        layer = make(activation="relu") if relu else make()
        more = {"mask": mask, "mutable": ["batch_stats"]}
        y, new = layer.apply(variables(params, state), x, residual=residual, **more)
        return y, new["batch_stats"]

    first = make(axis_name=None).init(jax.random.key(0), setting.one_row())
    return Layer(first["params"], first["batch_stats"], fused if inside else outside(plain))


def jbn(setting, inside=False):
    from jbn.linen import BatchNorm

    return linen(setting, BatchNorm, inside)


def flax(setting, fast=True):
    from flax.linen import BatchNorm

    return linen(setting, functools.partial(BatchNorm, use_fast_variance=fast))


def nnx(setting):
    from flax import nnx

    layer = nnx.BatchNorm(
        setting.shape[-1],
        use_running_average=not setting.training,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        dtype=setting.dtype,
        axis_name=setting.axis_name,
        rngs=nnx.Rngs(0),
    )
    graph, params, state = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def plain(params, state, x):
        layer = nnx.merge(graph, params, state, copy=True)
        return layer(x), nnx.state(layer, nnx.BatchStat)

    return Layer(params, state, outside(plain))


def haiku(setting):
    import haiku as hk

    def layer(training, axis_name):
        def call(x):
            made = hk.BatchNorm(True, True, MOMENTUM, EPSILON, cross_replica_axis=axis_name)
            return made(x, is_training=training)

        return hk.transform_with_state(call)

    params, state = layer(True, None).init(None, setting.one_row())
    apply = layer(setting.training, setting.axis_name).apply
    return Layer(params, state, outside(lambda params, state, x: apply(params, state, None, x)))


def equinox(setting):
    import equinox as eqx

    axes = "examples" if setting.axis_name is None else (setting.axis_name, "examples")
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        setting.shape[-1], axes, EPSILON, momentum=MOMENTUM, mode="batch", inference=not setting.training
    )
    params, static = eqx.partition(layer, eqx.is_array)

    def plain(params, state, x):
        layer = eqx.combine(params, static)
        state = jax.tree.map(lambda leaf: leaf, state)  # Equinox takes a state only once
        example = functools.partial(jax.vmap, axis_name="examples", in_axes=(0, None), out_axes=(0, None))
        y, state = example(layer)(jnp.moveaxis(x, -1, 1), state)
        return jnp.moveaxis(y, 1, -1), state

    return Layer(params, state, outside(plain))


REGISTRY = (
    Contestant("jbn", "jbn", jbn),
    Contestant("jbn, relu inside", "jbn", functools.partial(jbn, inside=True), inside=True),
    Contestant("Flax", "flax", flax),
    Contestant("Flax safe", "flax", functools.partial(flax, fast=False)),
    Contestant("NNX", "flax", nnx),
    Contestant("Haiku", "haiku", haiku),
    Contestant("Equinox", "equinox", equinox),
)


def installed(inside=False):
    """Those that can run here; with `inside` also the one that takes relu and residual into the layer."""
    wanted = json.loads(os.environ.get(LAYERS, "[]"))
    return [
        one
        for one in REGISTRY
        if one.installed() and (inside or not one.inside) and (not wanted or one.name in wanted)
    ]


def named(name):
    return next(one for one in REGISTRY if one.name == name)
