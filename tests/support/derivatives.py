"""Batch norm and its two-pass definition as functions of one flat vector, whose derivatives are compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jbn
from tests.support.cases import assert_close

TOLERANCE = 2.0**-40  # float64 has 52 bits; four derivatives, each a sum of products, may lose twelve
ROWS, C, EPSILON = 6, 2, 0.1
MASKS = {
    "no mask": None,
    "mask": np.array([1, 1, 1, 0, 1, 0], bool),
    "weights": np.array([0.5, 2, 1, 0, 3, 0]),
}


def training(params, x, mask=None, axis_name=None):
    return jbn.batch_norm(
        params, None, x, use_running_average=False, epsilon=EPSILON, mask=mask, axis_name=axis_name
    )[0]


def over_vmap(params, x, mask=None):
    cut = jax.tree.map(lambda a: a.reshape(2, -1, *a.shape[1:]), (x, mask))
    y = jax.vmap(functools.partial(training, axis_name="data"), in_axes=(None, 0, 0), axis_name="data")
    return y(params, *cut).reshape(x.shape)


def over_shard_map(params, x, mask=None, check_vma=True):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split = P("data")
    return jax.shard_map(
        functools.partial(training, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), split, split),
        out_specs=split,
        check_vma=check_vma,
    )(params, x, mask)


def two_pass(params, x, mask=None):
    """The definition; x is 0 where the mask takes out."""
    weights = (jnp.ones(len(x)) if mask is None else jnp.asarray(mask, x.dtype))[:, None]
    mean = jnp.sum(weights * x, 0, keepdims=True) / jnp.sum(weights)
    var = jnp.sum(weights * (x - mean) ** 2, 0, keepdims=True) / jnp.sum(weights)
    return params["scale"][None] * (x - mean) / jnp.sqrt(var + EPSILON) + params["bias"][None]


MODES = {
    "one device": training,
    "vmap": over_vmap,
    "shard_map": over_shard_map,
    "unchecked": functools.partial(over_shard_map, check_vma=False),
}
modes = pytest.mark.parametrize("mode", MODES)


def point():
    """x, scale and bias as one flat vector, and a direction."""
    rng = np.random.default_rng(0)
    return rng.standard_normal(ROWS * C + 2 * C), rng.standard_normal(ROWS * C + 2 * C)


def flat(normalize, mask, hidden):
    """y of the flat vector, 0 in places that take no part: there x is `hidden`."""
    used = np.ones((ROWS, 1), bool) if mask is None else (mask > 0)[:, None]

    def y(z):
        x, scale, bias = jnp.split(z, [ROWS * C, ROWS * C + C])
        x = jnp.where(used, x.reshape(ROWS, C), hidden)
        return jnp.where(used, normalize({"scale": scale, "bias": bias}, x, mask), 0.0)

    return y


def pair(mode, mask):
    """y by jbn, with NaN where the mask takes out, and y by the definition."""
    return flat(MODES[mode], MASKS[mask], np.nan), flat(two_pass, MASKS[mask], 0.0)


def loss(y):
    cotangent = np.random.default_rng(1).standard_normal((ROWS, C))
    return lambda z: jnp.sum(cotangent * jnp.sin(y(z)))


def assert_equal(derivatives, ours, reference):
    found, expected = (jax.jit(derivatives, static_argnums=0)(f, *point()) for f in (ours, reference))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, TOLERANCE)
