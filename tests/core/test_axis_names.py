"""Groups of devices along an axis, and where no axis of that name is bound."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
from tests.support.cases import assert_close, assert_trees_close
from tests.support.synchronized import (
    BATCH_STATS,
    COTANGENT,
    PARAMS,
    TOLERANCE,
    X,
    both,
    core,
    gradients,
    mesh,
)

GROUPS = [[0, 3, 5, 6], [1, 2, 4, 7]]


@both
@pytest.mark.parametrize("kind", ["pmap", "unchecked"])
def test_each_group_of_devices_is_a_batch(kind, apply):
    step = functools.partial(gradients, apply, axis_index_groups=GROUPS)
    if kind == "pmap":
        run = jax.pmap(functools.partial(step, PARAMS), axis_name="data")
        result = run(X.reshape(8, 8, 4), COTANGENT.reshape(8, 8, 4))
    else:

        def local(x, cotangent):
            return jax.tree.map(lambda a: a[None], step(PARAMS, x, cotangent))

        run = jax.shard_map(local, mesh=mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=False)
        result = jax.jit(run)(X, COTANGENT)
    for group in GROUPS:
        x, cotangent = (array.reshape(8, 8, 4)[group].reshape(-1, 4) for array in (X, COTANGENT))
        y, new, (d_params, dx) = gradients(apply, PARAMS, x, cotangent, axis_name=None)
        of_group = jax.tree.map(lambda a, group=group: np.asarray(a)[group], result)
        assert_close(of_group[0].reshape(-1, 4), y, TOLERANCE)
        assert_close(of_group[2][1].reshape(-1, 4), dx, TOLERANCE)
        assert_trees_close(jax.tree.map(lambda a: a.sum(0), of_group[2][0]), d_params, TOLERANCE)
        for place in range(4):
            assert_trees_close(jax.tree.map(lambda a, place=place: a[place], of_group[1]), new, TOLERANCE)


def test_a_single_group_is_the_whole_axis():
    moments = functools.partial(jbn.moments, axis_name="data", axis_index_groups=[range(8)])
    found = jax.pmap(moments, axis_name="data")(X.reshape(8, 8, 4))
    for device in range(8):
        assert_trees_close(jax.tree.map(lambda a, i=device: a[i], found), jbn.moments(X), TOLERANCE)


def test_groups_are_mesh_axes_elsewhere():
    """The way out that the error names: the inner axis of a mesh of (groups, devices per group)."""
    grouped = jax.shard_map(
        functools.partial(core, axis_name="inner"),
        mesh=jax.make_mesh((2, 4), ("group", "inner"), axis_types=(AxisType.Auto,) * 2),
        in_specs=(P(), P(("group", "inner"))),
        out_specs=(P(("group", "inner")), P("group")),
    )
    y, new = jax.jit(grouped)(PARAMS, X)
    for i in range(2):
        expected, stats = core(PARAMS, X[32 * i : 32 * (i + 1)], axis_name=None)
        assert_close(y[32 * i : 32 * (i + 1)], expected, TOLERANCE)
        assert_trees_close(jax.tree.map(lambda a, i=i: a[4 * i : 4 * (i + 1)], new), stats, TOLERANCE)


@both
@pytest.mark.parametrize("kind", ["vmap", "shard_map"])
def test_groups_where_jax_has_none_are_an_error_with_the_way_out(kind, apply):
    run = functools.partial(apply, PARAMS, axis_index_groups=GROUPS)
    if kind == "vmap":
        run, x = jax.vmap(run, axis_name="data"), X.reshape(8, 8, 4)
    else:
        run, x = jax.shard_map(run, mesh=mesh(), in_specs=P("data"), out_specs=P("data")), X
    with pytest.raises(ValueError, match=r"axis_index_groups is .* Split the axis in two.* as axis_name"):
        jax.eval_shape(run, x)


@both
def test_training_with_an_unbound_axis_is_an_error_that_says_what_to_do(apply):
    for kind in (ValueError, NameError):
        with pytest.raises(kind, match=r"axis_name is 'data'.*shard_map, pmap or vmap.*leave axis_name out"):
            jax.jit(apply)(PARAMS, X)
    with pytest.raises(NameError, match="'batch'"):
        jax.vmap(functools.partial(apply, PARAMS, axis_name=("data", "batch")), axis_name="data")(X[:, None])


@both
@pytest.mark.parametrize("settings", [{}, {"axis_index_groups": GROUPS}], ids=["all", "groups"])
def test_evaluation_needs_no_axis(apply, settings):
    expected, _ = apply(PARAMS, X, training=False, axis_name=None)
    np.testing.assert_array_equal(apply(PARAMS, X, training=False, **settings)[0], expected)


@pytest.mark.parametrize("training", [True, False])
def test_initialisation_needs_no_axis(training):
    layer = jbn.linen.BatchNorm(use_running_average=not training, axis_name="data", axis_index_groups=GROUPS)
    variables = layer.init(jax.random.key(0), X[:1])
    assert_trees_close(variables, {"params": PARAMS, "batch_stats": BATCH_STATS}, 0.0)


@pytest.mark.parametrize("kind", ["vmap", "pmap", "shard_map"])
def test_initialisation_where_the_axis_is_bound(kind):
    layer = jbn.linen.BatchNorm(use_running_average=False, axis_name="data")
    init = functools.partial(layer.init, jax.random.key(0))
    if kind == "shard_map":
        variables = jax.jit(jax.shard_map(init, mesh=mesh(), in_specs=P("data"), out_specs=P()))(X)
    else:
        stacked = (jax.vmap if kind == "vmap" else jax.pmap)(init, axis_name="data")(X.reshape(8, 8, 4))
        variables = jax.tree.map(lambda a: a[-1], stacked)
    assert_trees_close(variables, {"params": PARAMS, "batch_stats": BATCH_STATS}, 0.0)
