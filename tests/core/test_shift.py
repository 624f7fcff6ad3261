"""The rows whose mean is the shift: enough of them, spread over the batch, and exact where they are equal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from jbn._core.shift import draw_rows, pick_shift, subsample
from jbn._core.statistics import _counts
from tests.support import reference
from tests.support.compiling import optimized

ROWS = np.float32(1)  # their number, which without a mask is not asked for


@pytest.mark.parametrize(
    ("shape", "axes", "rows"),
    [
        ((4096, 5), (0,), (32,)),
        ((7, 3), (0,), (4,)),
        ((256, 7, 7, 8), (0, 1, 2), (8, 2, 2)),
        ((1, 64, 64, 3), (0, 1, 2), (1, 16, 2)),
        ((8, 9, 3), (0, 1), (8, 4)),
        ((3, 1000, 4), (0, 1), (2, 16)),
        ((4, 3, 6, 5), (0, 2, 3), (4, 4, 2)),
        ((3, 20), (1,), (16,)),
    ],
)
def test_thirty_two_rows_or_as_many_as_can_be(shape, axes, rows):
    found = subsample(jnp.zeros(shape), axes)
    assert tuple(found.shape[axis] for axis in axes) == rows


def test_they_are_spread_over_the_batch():
    x = jnp.arange(64.0)[:, None]
    np.testing.assert_array_equal(subsample(x, (0,))[:, 0], np.arange(0, 64, 2))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-3, 12345.678, -2.7e4])
def test_equal_rows_have_exactly_their_value(value, dtype):
    """32 times 0.1, added one by one, is no multiple of it any more."""
    x = jnp.full((96, 3), value, dtype)
    shift = optimized(lambda x: pick_shift(x, None, (0,), ROWS))(x)
    np.testing.assert_array_equal(shift, x[:1].astype(np.float32))


def test_rows_that_are_nearly_equal_have_a_shift_near_them():
    x = 1e4 + 1e-3 * np.arange(-32, 32, dtype=np.float32)[:, None]
    shift = pick_shift(jnp.asarray(x, jnp.float32), None, (0,), ROWS)
    assert x.min() <= float(shift[0, 0]) <= x.max()


@pytest.mark.parametrize("value", [1e-30, 1e30, 1e38, 3e38, -3e38])
def test_no_constant_is_too_large_or_small(value):
    x = jnp.full((96, 3), value, jnp.float32)
    step = optimized(functools.partial(jbn.batch_norm, use_running_average=False, momentum=0.0))
    y, new = step(None, {"mean": jnp.zeros(3), "var": jnp.ones(3)}, x)
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(new["mean"], np.float32(value))
    np.testing.assert_array_equal(new["var"], 0)


@pytest.mark.parametrize(("location", "first", "spread"), [(1e6, 3.0, 0.05), (1e4, 0.03, 5e-4)])
def test_a_first_row_far_out_is_one_of_many(location, first, spread):
    x = np.random.default_rng(0).normal(location, spread, (100_000, 4)).astype(np.float32)
    x[0] = location + first
    var = np.asarray(optimized(jbn.moments)(x).var, np.float64)
    assert np.abs(var / x.astype(np.float64).var(0) - 1).max() < 1e-6


@pytest.mark.parametrize("shape", [(16, 0), (4, 4, 0), (0, 3), (0, 0)])
def test_nothing_to_measure(shape):
    assert jbn.moments(jnp.zeros(shape)).var.shape == shape[-1:]


N, T, C = 96, 7, 16
RANDOM = np.random.default_rng(5)
MASKS = {
    "all": np.ones(N, bool),
    "two in three": np.arange(N) % 3 > 0,
    "every 16th": np.arange(N) % 16 == 0,
    "the first three": np.arange(N) < 3,
    "all but one": np.arange(N) == 71,
    "lengths": np.arange(T) < RANDOM.integers(0, T + 1, N)[:, None],
    "one long sequence": np.arange(T) < np.where(np.arange(N) == 40, T, 0)[:, None],
    "steps": (np.arange(T) > 4)[None, :, None],
    "entries": RANDOM.random((N, T, C)) < 0.5,
    "another row of each channel": np.arange(N)[:, None, None] == 5 * np.arange(C),
    "another step of each channel": np.arange(T)[None, :, None] == np.arange(C) % T,
    "weights": RANDOM.exponential(size=(N, T)).astype(np.float32) * (RANDOM.random((N, T)) < 0.5),
    "weights of channels": RANDOM.exponential(size=(N, 1, C)).astype(np.float32),
}
AXES = {"channels last": (0, 1), "channels first": (0, 2), "channels in front": (1, 2)}


def batch(mask):
    """x in which every row is another, with NaN in what is masked, and the mask with x's rank."""
    x = np.random.default_rng(0).standard_normal((N, T, C)).astype(np.float32)
    used = reference.full_weights(x, -1, mask)
    return np.where(used > 0, x, np.float32(np.nan)), mask.reshape(mask.shape + (1,) * (3 - mask.ndim)), used


@pytest.mark.parametrize("place", AXES)
@pytest.mark.parametrize("name", MASKS)
def test_under_a_mask_rows_are_drawn_that_take_part(name, place):
    x, mask, used = batch(MASKS[name])
    order = {"channels last": (0, 1, 2), "channels first": (0, 2, 1), "channels in front": (2, 0, 1)}[place]
    rows = draw_rows(jnp.asarray(x.transpose(order)), jnp.asarray(mask.transpose(order)), AXES[place])
    rows = np.moveaxis(np.asarray(rows), 1 + order.index(2), -1).reshape(32, C)
    for channel in range(C):
        values = x[..., channel][used[..., channel] > 0]
        assert np.isin(rows[:, channel], values).all()
        assert len(np.unique(rows[:, channel])) >= min(len(values), 32) / 3


@pytest.mark.parametrize("name", MASKS)
def test_under_a_mask_the_shift_is_as_near_the_mean_as_that_of_a_few_rows(name):
    """On average over channels; that of 32 random rows would be at 1/32 of the variance."""
    x, mask, used = batch(MASKS[name])
    shift = shift_under(jnp.asarray(x), jnp.asarray(mask), (0, 1))
    _, mean, var = reference.statistics(x, -1, used)
    assert np.square(shift - mean).mean() <= 0.1 * var.mean()


def shift_under(x, mask, axes):
    return pick_shift(x, mask, axes, _counts(x, mask, axes)[0])


@pytest.mark.parametrize("place", [0, 1, 63])
def test_a_row_of_hardly_any_weight_is_not_drawn(place):
    """It may lie far out, and then the shift would."""
    weights = np.ones((64, 1), np.float32)
    weights[place] = 1e-20
    rows = draw_rows(jnp.arange(64.0)[:, None], jnp.asarray(weights), (0,))
    assert (np.asarray(rows) != place).all()


@pytest.mark.parametrize("weight", [1e-40, 1e-300])
def test_rows_of_weights_below_those_of_float32_take_part(weight):
    with jax.enable_x64(True):
        weights = jnp.full((64, 1), weight).at[0].set(0)
        rows = draw_rows(jnp.arange(64.0)[:, None], weights, (0,))
    assert (np.asarray(rows) > 0).all()


def test_a_row_is_drawn_as_often_as_it_weighs():
    x, weights = jnp.arange(64.0)[:, None], np.ones((64, 1), np.float32)
    weights[3], weights[40] = 62, 0
    rows = np.asarray(draw_rows(x, jnp.asarray(weights), (0,)))
    assert 13 <= (rows == 3).sum() <= 19  # half of the weight
    assert (rows != 40).all()


def test_where_nothing_takes_part_the_shift_is_0():
    x = jnp.full((8, 3), np.nan, jnp.float32)
    for mask in (np.zeros((8, 1), bool), np.zeros((1, 3), bool), np.zeros((8, 3), np.float32)):
        np.testing.assert_array_equal(shift_under(x, jnp.asarray(mask), (0,)), np.zeros((1, 3)))
    one = jnp.asarray(np.arange(3)[None] == 1) & jnp.ones((8, 3), bool)
    shift = shift_under(jnp.where(one, jnp.float32(0.1), x), one, (0,))
    np.testing.assert_array_equal(shift, np.float32([[0, 0.1, 0]]))


@pytest.mark.parametrize("sizes", ["n, 7, 16", "n, t, 16"])
@pytest.mark.parametrize("name", [None, "two in three", "lengths", "entries"])
def test_of_symbolic_sizes_the_same_rows_are_drawn(name, sizes):
    x, mask, _ = batch(np.ones(1, bool) if name is None else MASKS[name])
    symbols = jax.export.symbolic_shape(sizes)
    shape = [symbols[i] if size > 1 else 1 for i, size in enumerate(mask.shape)]
    structs = jax.ShapeDtypeStruct(symbols, x.dtype), jax.ShapeDtypeStruct(shape, mask.dtype)
    draw = jax.jit(functools.partial(draw_rows, axes=(0, 1)))
    found = jax.export.export(draw)(*structs).call(x, mask)
    np.testing.assert_array_equal(found, draw(x, mask))


def test_x_may_have_many_axes():
    """Powers that order the places of each axis stay within int32."""
    x = jnp.arange(2.0**11).reshape((2,) * 11 + (1,))
    rows = draw_rows(x, None, tuple(range(11)))
    assert len(np.unique(rows)) >= 16


def test_an_explicit_axis_within_a_shard_map_over_another():
    """The axes of the shard_map are not to be touched there."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x = np.random.default_rng(0).standard_normal((16, 8, 3)).astype(np.float32) + 1e4
    mask = np.arange(16) % 3 > 0

    def moments(x, mask):
        found = jbn.moments(x, axis_name="a", mask=mask)
        return found.mean, found.var

    sharded = jax.device_put(x, NamedSharding(mesh, P("a", "b")))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.shard_map(moments, in_specs=(P("a"), P("a")), out_specs=P(), axis_names={"a"}))(
            sharded, jax.device_put(mask, NamedSharding(mesh, P("a")))
        )
    _, mean, var = reference.statistics(x, -1, np.broadcast_to(mask[:, None, None], x.shape))
    np.testing.assert_allclose(found[0], mean[0, 0], rtol=1e-6)
    np.testing.assert_allclose(found[1], var[0, 0], rtol=1e-5)
