"""Which devices talk, and how often: counted in compiled programs; groups of devices; unbound axis names."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
from tests.cases import assert_close, assert_trees_close, tolerance

PARAMS, BATCH_STATS = jbn.init(4)
X = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
COTANGENT = np.random.default_rng(1).standard_normal((64, 4)).astype(np.float32)
GROUPS = [[0, 3, 5, 6], [1, 2, 4, 7]]
TOLERANCE = tolerance(np.float32)


def core(params, x, training=True, axis_name="data", **settings):
    return jbn.batch_norm(
        params, BATCH_STATS, x, use_running_average=not training, axis_name=axis_name, **settings
    )


def linen(params, x, training=True, axis_name="data", **settings):
    layer = jbn.linen.BatchNorm(use_running_average=not training, axis_name=axis_name, **settings)
    y, new = layer.apply({"params": params, "batch_stats": BATCH_STATS}, x, mutable=["batch_stats"])
    return y, new["batch_stats"]


def gradients(apply, params, x, cotangent, **settings):
    y, pullback, new = jax.vjp(functools.partial(apply, **settings), params, x, has_aux=True)
    return y, new, pullback(cotangent)


both = pytest.mark.parametrize("apply", [core, linen])


def mesh(devices=8):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def compiled(kind, function, *split):
    """The program that XLA makes of `function(params, *split)` on eight devices."""
    if kind == "pmap":
        mapped = jax.pmap(functools.partial(function, PARAMS), axis_name="data")
        return mapped.lower(*(array.reshape(8, 8, 4) for array in split)).compile().as_text()
    # Parameters that differ from device to device keep JAX from adding up their gradients, which is not ours.
    whole = jax.tree.map(lambda a: jnp.broadcast_to(a, (8, 4)), PARAMS)

    def local(params, *split):
        return function(jax.tree.map(lambda a: a[0], params), *split)

    mapped = jax.shard_map(
        local, mesh=mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=kind == "shard_map"
    )
    return jax.jit(mapped).lower(whole, *split).compile().as_text()


def collectives(program):
    return re.findall(r"= .*? (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)\w*\(", program)


kinds = pytest.mark.parametrize("kind", ["pmap", "shard_map", "unchecked"])


@both
@kinds
def test_one_all_reduce_forward(kind, apply):
    assert collectives(compiled(kind, apply, X)) == ["all-reduce"]


@kinds
def test_two_all_reduces_with_gradients(kind):
    program = compiled(kind, functools.partial(gradients, core), X, COTANGENT)
    assert collectives(program) == ["all-reduce"] * 2


@both
@kinds
def test_none_in_evaluation(kind, apply):
    program = compiled(kind, functools.partial(gradients, apply, training=False), X, COTANGENT)
    assert collectives(program) == []


def test_the_gradients_of_shared_parameters_cost_no_further_all_reduce():
    """Under check_vma JAX sums them: that sum and the one of the backward pass become one."""
    run = jax.shard_map(
        functools.partial(gradients, core),
        mesh=mesh(),
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P("data"), P(), (P(), P("data"))),
    )
    assert collectives(jax.jit(run).lower(PARAMS, X, COTANGENT).compile().as_text()) == ["all-reduce"] * 2


def traffic(devices):
    """Operand types of every all-reduce with gradients, on so many devices; none of them is needed."""
    run = jax.shard_map(
        functools.partial(gradients, core),
        mesh=AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P("data"), P(), (P("data"), P("data"))),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((2 * devices, 4), np.float32)
    lowered = jax.jit(run).trace(PARAMS, x, x).lower(lowering_platforms=("cpu",))
    return re.findall(r"all_reduce.*?\}\) : \((.*?)\)", lowered.as_text(), re.DOTALL)


def numbers(operands):
    return sum(int(np.prod([int(n) for n in re.findall(r"(\d+)x", operand)])) for operand in operands)


def test_the_bytes_do_not_grow_with_the_devices():
    small, large = traffic(16), traffic(256)
    assert small == large
    assert 1 <= len(large) <= 3
    assert numbers(large) <= 8 * 4  # eight numbers per channel
    assert len(traffic(8)) == 2
    assert numbers(traffic(8)) <= (8 * 5 + 2) * 4  # a row of five for each device, and two


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("devices", [2, 8, 9, 16, 256])
def test_statistics_are_known_to_be_equal_on_every_device(devices, check_vma):
    """Checked by JAX: out_specs P() of something that may differ is an error under check_vma."""
    run = jax.shard_map(
        core,
        mesh=AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data")),
        out_specs=(P("data"), P()),
        check_vma=check_vma,
    )
    y, new = jax.eval_shape(run, PARAMS, jax.ShapeDtypeStruct((2 * devices, 4), np.float32))
    assert y.shape == (2 * devices, 4)
    assert new["mean"].shape == (4,)


def test_statistics_of_one_device_each_are_not_equal():
    """Without axis_name they differ: out_specs P() is an error of JAX, and stacking them is right."""
    alone = functools.partial(core, axis_name=None)

    def run(out):
        mapped = jax.shard_map(alone, mesh=mesh(), in_specs=(P(), P("data")), out_specs=(P("data"), out))
        return jax.jit(mapped)(PARAMS, X)

    with pytest.raises(ValueError, match="out_specs"):
        run(P())
    _, new = run(P("data"))
    expected = [alone(PARAMS, part)[1]["mean"] for part in X.reshape(8, 8, 4)]
    assert_close(new["mean"].reshape(8, 4), np.stack(expected), TOLERANCE)


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
