"""Which devices talk, and how often: counted in compiled programs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from tests.support.cases import assert_close
from tests.support.compiling import optimized
from tests.support.synchronized import COTANGENT, PARAMS, TOLERANCE, X, both, core, gradients, mesh


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
    return optimized(mapped).lower(whole, *split).compile().as_text()


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
    assert collectives(optimized(run).lower(PARAMS, X, COTANGENT).compile().as_text()) == ["all-reduce"] * 2


@pytest.mark.parametrize("shape", [(64, 8, 8, 4), (4096, 4)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_jit_of_a_sharded_batch_needs_one_more_for_the_shift(shape, dtype):
    x = jax.device_put(jnp.zeros(shape, dtype), jax.NamedSharding(mesh(), P("data")))
    run = functools.partial(core, axis_name=None)
    assert collectives(optimized(run).lower(PARAMS, x).compile().as_text()) == ["all-reduce"] * 2
    with_gradients = optimized(jax.grad(lambda params, x: jnp.sum(jnp.sin(run(params, x)[0])), (0, 1)))
    assert collectives(with_gradients.lower(PARAMS, x).compile().as_text()) == ["all-reduce"] * 3


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((96, 4), P("data")),
        ((800, 4), P("data")),
        ((72, 3, 3, 4), P("data")),
        ((16, 17, 4), P("data")),
        ((8, 16, 32, 4), P(None, None, "data")),
        ((8, 56, 56, 4), P(None, "data")),
    ],
    ids=str,
)
def test_jit_gathers_nothing_and_sums_whole_channels(shape, cut):
    x = jax.device_put(jnp.zeros(shape, jnp.bfloat16), jax.NamedSharding(mesh(), cut))
    run = functools.partial(core, axis_name=None)
    with_gradients = optimized(jax.grad(lambda params, x: jnp.sum(jnp.sin(run(params, x)[0])), (0, 1)))
    program = with_gradients.lower(PARAMS, x).compile().as_text()
    assert "all-gather" not in collectives(program)
    assert not re.search(r"c64\S* all-reduce", program)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_explicit_axes_cost_what_automatic_ones_do(dtype):
    assert of_masked(AxisType.Explicit, P("data"), None, dtype) == ["all-reduce"] * 3


# Under a mask: for the places of examples, for the mask of those, for their rows, for the sums, backward.
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("mask", "cut", "number"),
    [
        ((64,), P("data"), 4),
        ((64,), P(None, "data"), 3),
        ((64, 8), P("data"), 5),
        ((64, 8), P(None, "data"), 5),
        ((64, 8, 8, 4), P("data"), 5),
        ((64, 8, 8, 4), P(None, "data"), 5),
    ],
    ids=str,
)
def test_a_mask_costs_two_more_for_the_shift_at_most(kind, mask, cut, number):
    assert of_masked(kind, cut, mask, np.float32) == ["all-reduce"] * number


def of_masked(kind, cut, shape, dtype):
    """The collectives of a step with gradients, of a batch and a mask that are sharded alike."""
    sharded = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    x = jax.device_put(jnp.zeros((64, 8, 8, 4), dtype), jax.NamedSharding(sharded, cut))
    mask = None
    if shape is not None:
        mask = jax.device_put(jnp.ones(shape, bool), jax.NamedSharding(sharded, P(*cut[: len(shape)])))

    def loss(params, x, mask):
        return jnp.sum(jnp.sin(core(params, x, axis_name=None, mask=mask)[0]))

    return collectives(optimized(jax.grad(loss, (0, 1))).lower(PARAMS, x, mask).compile().as_text())


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
