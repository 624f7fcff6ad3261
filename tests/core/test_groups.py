"""Ghost batch norm, arXiv 1705.08741: each group is a batch, and statistics are those of the whole one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from tests.support.cases import CASES, assert_close, assert_trees_close, by_name, tolerance
from tests.support.doors import every_door

TOLERANCE = tolerance(np.float32)
PARAMS = {"scale": np.array([0.5, 1, 2], np.float32), "bias": np.array([0, 1, -1], np.float32)}
STATS = jbn.init(3)[1]
X = (np.random.default_rng(0).standard_normal((12, 5, 3)) * 2 + np.arange(12)[:, None, None]).astype(
    np.float32
)
COTANGENT = np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)
MASK = np.random.default_rng(2).random((12, 5)) < 0.6


def alone(params, x, mask=None, **settings):
    """y of a group by itself."""
    return jbn.batch_norm(params, None, x, use_running_average=False, mask=mask, **settings)[0]


@every_door
@pytest.mark.parametrize("size", [1, 2, 4, 12])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_each_group_is_a_batch_and_the_whole_updates_statistics(door, size, mask):
    @jax.jit
    def grouped_and_by_hand():
        grouped = door(PARAMS, STATS, X, momentum=0.9, virtual_batch_size=size, mask=mask)
        apart = (
            jnp.reshape(array, (12 // size, size, *array.shape[1:]))
            for array in (X, mask)
            if array is not None
        )
        by_hand = jax.vmap(functools.partial(alone, PARAMS))(*apart)
        return grouped, by_hand.reshape(X.shape), door(PARAMS, STATS, X, momentum=0.9, mask=mask)[1]

    (y, new), expected, whole = grouped_and_by_hand()
    assert_close(y, expected, TOLERANCE, where=None if mask is None else mask[..., None])
    assert_trees_close(new, whole, TOLERANCE)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_gradients_are_those_of_the_groups(mask):
    def ours(params, x):
        settings = {"use_running_average": False, "virtual_batch_size": 4, "mask": mask}
        return jbn.batch_norm(params, STATS, x, **settings)[0]

    def by_hand(params, x):
        masks = [None] * 3 if mask is None else np.split(mask, 3)
        return jnp.concatenate([alone(params, x, m) for x, m in zip(jnp.split(x, 3), masks, strict=True)])

    params = jax.tree.map(jnp.asarray, PARAMS)
    found, expected = (
        jax.jit(lambda params, x, f=f: jax.vjp(f, params, x)[1](COTANGENT))(params, X)
        for f in (ours, by_hand)
    )
    assert_trees_close(found, expected, TOLERANCE)


GROUPED = [case for case in CASES if case.name not in ("one example, many pixels", "two rows")]


@pytest.mark.parametrize(**by_name(GROUPED))
def test_every_shape_axis_dtype_and_mask(case):
    """Two groups side by side are `vmap` over an axis in front of the examples."""
    x, mask = case.make_x(), case.make_mask()
    axes = [a for a in range(x.ndim) if a not in {b % x.ndim for b in np.atleast_1d(case.axis)}]
    batch = axes[0]
    size = x.shape[batch] // 2
    settings = case.settings | {"use_running_average": False}
    params, stats = case.make_params(), case.make_batch_stats()
    full = None if mask is None else np.broadcast_to(case.weights(), x.shape).astype(np.float32)

    @jax.jit
    def grouped_and_by_hand(x):
        grouped = jbn.batch_norm(params, stats, x, virtual_batch_size=size, **settings)
        halves = []
        for part in np.split(np.arange(2 * size), 2):
            options = settings | {"mask": None if full is None else np.take(full, part, batch)}
            halves.append(jbn.batch_norm(params, None, jnp.take(x, part, batch), **options)[0])
        return grouped, jnp.concatenate(halves, batch), jbn.batch_norm(params, stats, x, **settings)[1]

    (y, new), expected, whole = grouped_and_by_hand(x)
    assert y.dtype == x.dtype
    assert_close(y, expected, tolerance(case.dtype), where=None if mask is None else case.weights() > 0)
    assert_trees_close(new, whole, TOLERANCE)


@pytest.mark.parametrize("kind", [np.float32, np.complex64])
@pytest.mark.parametrize("devices", [4, 16])
def test_groups_stay_on_their_device_and_the_whole_updates_statistics(devices, kind):
    x = (np.random.default_rng(3).standard_normal((devices, 4, 5, 3)) * 2 + 100).astype(kind)
    x = x * kind(1 + 0.5j) if kind is np.complex64 else x
    stats = STATS | {"mean": np.zeros(3, kind)}

    def step(x):
        settings = {"use_running_average": False, "momentum": 0.0, "virtual_batch_size": 2}
        return jbn.batch_norm(None, stats, x, axis_name="data", **settings)

    y, new = jax.vmap(step, axis_name="data")(x)
    expected = jax.vmap(functools.partial(alone, None))(x.reshape(-1, 2, 5, 3)).reshape(x.shape)
    assert_close(y, expected, TOLERANCE)
    rows = x.reshape(-1, 3)
    assert_close(new["mean"], np.broadcast_to(rows.mean(0), (devices, 3)), TOLERANCE)
    assert_close(new["var"], np.broadcast_to(rows.var(0), (devices, 3)), TOLERANCE)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_examples(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    step = functools.partial(jbn.batch_norm, PARAMS, STATS, use_running_average=False, virtual_batch_size=2)
    x = X.repeat(2, 0)[:16]
    with jax.set_mesh(mesh):
        found = jax.jit(step)(jax.device_put(x, NamedSharding(mesh, P("data"))))
    assert_trees_close(found, step(x), TOLERANCE)


def test_a_symbolic_number_of_examples():
    shape = jax.export.symbolic_shape("2*b, 5, 3")
    step = functools.partial(jbn.batch_norm, PARAMS, STATS, use_running_average=False, virtual_batch_size=2)
    exported = jax.export.export(jax.jit(step))(jax.ShapeDtypeStruct(shape, np.float32))
    assert_trees_close(exported.call(X), step(X), TOLERANCE)


@pytest.mark.parametrize(
    "more", [{"virtual_batch_size": 2}, {"mask": np.ones(16, bool)}, {"residual": X[:1]}]
)
def test_sharded_examples_where_no_mesh_is_set(more):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    x = X.repeat(2, 0)[:16]
    step = functools.partial(jbn.batch_norm, PARAMS, STATS, use_running_average=False, **more)
    found = jax.jit(step)(jax.device_put(x, NamedSharding(mesh, P("data"))))
    assert_trees_close(found, step(x), TOLERANCE)


def test_no_examples_are_no_groups():
    y, new = jbn.batch_norm(PARAMS, STATS, X[:0], use_running_average=False, virtual_batch_size=4)
    assert y.shape == (0, 5, 3)
    assert_trees_close(new, STATS, 0.0)


def test_conditional_scale_and_residual_are_cut_alike():
    scale = np.random.default_rng(4).uniform(0.5, 1.5, (12, 1, 3)).astype(np.float32)
    residual = np.random.default_rng(5).standard_normal((12, 1, 3)).astype(np.float32)
    y, _ = jbn.batch_norm(
        {"scale": scale, "bias": PARAMS["bias"]},
        STATS,
        X,
        use_running_average=False,
        virtual_batch_size=4,
        residual=residual,
        activation="relu",
    )
    expected = np.concatenate([alone(None, x) for x in np.split(X, 3)]) * scale + PARAMS["bias"] + residual
    assert_close(y, np.maximum(expected, 0), TOLERANCE)


def test_evaluation_does_not_ask_for_whole_groups():
    y, _ = jbn.batch_norm(PARAMS, STATS, X[:5], use_running_average=True, virtual_batch_size=4)
    assert_close(y, jbn.batch_norm(PARAMS, STATS, X[:5], use_running_average=True)[0], 0.0)
