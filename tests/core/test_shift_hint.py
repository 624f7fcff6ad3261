"""The running mean as shift, which is for TPUs: no worse however far off it is. Here a CPU takes that way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jbn
from jbn._core import xla
from tests.support import reference
from tests.support.cases import CASES, assert_close, assert_trees_close, by_name, tolerance
from tests.support.compiling import optimized

TOLERANCE = tolerance(np.float32)


@pytest.fixture(scope="module", autouse=True)
def as_on_tpu():
    """For the whole file: what is traced in one test may serve the next."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_HINT_PLATFORM", "cpu")
        yield


@pytest.fixture
def as_elsewhere(monkeypatch):
    """A function that ends the way of the TPU, to compare with what others do."""

    def end():
        monkeypatch.setattr(xla, "_HINT_PLATFORM", "tpu")
        jax.clear_caches()

    yield end
    jax.clear_caches()


def normal(location, shape=(512, 8)):
    return (np.random.default_rng(0).standard_normal(shape) + location).astype(np.float32)


def step(x, mean, **settings):
    batch_stats = {"mean": jnp.full(x.shape[-1], mean), "var": jnp.ones(x.shape[-1])}
    return jbn.batch_norm(None, batch_stats, x, use_running_average=False, momentum=0.0, **settings)


@pytest.mark.parametrize("hint", [1e4, 1e4 + 0.5, 1e4 + 30, 0.0, -1e4, 1e30, np.inf, np.nan])
def test_any_hint_is_as_good_as_rows(hint):
    x = normal(1e4)
    y, new = optimized(step)(x, hint)
    var = reference.statistics(x, -1).var.reshape(-1)
    assert np.abs(np.asarray(new["var"], np.float64) / var - 1).max() < 1e-6
    assert np.abs(np.asarray(y, np.float64) - reference.normalize(x, -1, None, None, 1e-5)).max() < 2e-6


def test_one_channel_may_be_far():
    x = normal(0) + np.where(np.arange(8) == 3, np.float32(1e4), np.float32(0))
    _, new = optimized(step)(x, 0.0)
    var = reference.statistics(x, -1).var.reshape(-1)
    assert np.abs(np.asarray(new["var"], np.float64) / var - 1).max() < 1e-6


def test_a_constant_channel_has_no_variance():
    x = np.full((48, 8), 0.1, np.float32)
    for hint in (0.0, 0.1, np.nextafter(np.float32(0.1), np.float32(1))):
        _, new = jax.jit(step)(x, hint)
        np.testing.assert_array_equal(new["var"], 0)
        np.testing.assert_array_equal(new["mean"], np.float32(0.1))


@pytest.mark.parametrize(**by_name(CASES))
def test_every_case(case):
    x, weights = case.make_x(), case.weights()
    expected = reference.statistics(x, case.axis, weights)
    settings = case.settings | {"momentum": 0.0, "use_running_average": False}
    run = jax.jit(functools.partial(jbn.batch_norm, **settings))
    _, new = run(case.make_params(), case.make_batch_stats(), x)
    assert_close(new["var"], expected.var.reshape(case.features), TOLERANCE)
    assert_close(new["mean"], expected.mean.reshape(case.features), TOLERANCE)


def everything(x, mean):
    """y, statistics and derivatives of first and second order."""

    def loss(x):
        y, new = step(x, mean)
        return jnp.sum(jnp.sin(y)), new

    gradient, new = jax.grad(loss, has_aux=True)(x)
    _, second = jax.jvp(jax.grad(lambda x: loss(x)[0]), (x,), (jnp.cos(x),))
    return gradient, second, new


@pytest.mark.parametrize("hint", [0.3, 50.0])
@pytest.mark.parametrize("way", [lambda f: f, jax.jit, jax.checkpoint])
def test_derivatives(as_elsewhere, way, hint):
    x = normal(0.2, (16, 4))
    found = way(everything)(x, hint)
    as_elsewhere()
    assert_trees_close(found, everything(x, hint), 4 * TOLERANCE)


@pytest.mark.parametrize("hint", [0.3, 50.0])
def test_vmap(hint):
    x = normal(0.2, (3, 16, 4)) + np.float32([[[0]], [[40]], [[9]]])
    run = functools.partial(step, mean=hint)
    y, new = jax.jit(jax.vmap(run))(x)
    for i in range(3):
        assert_trees_close((y[i], jax.tree.map(lambda a, i=i: a[i], new)), run(x[i]), TOLERANCE)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("hint", [0.3, 50.0])
def test_shard_map(hint, check_vma):
    """Each device decides for itself: there is no collective in the branch."""
    x = normal(0.2, (32, 4)) + np.where(np.arange(32) < 16, np.float32(0), np.float32(90))[:, None]
    run = jax.shard_map(
        functools.partial(step, mean=hint, axis_name="data"),
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=P("data"),
        out_specs=(P("data"), P()),
        check_vma=check_vma,
    )
    assert_trees_close(jax.jit(run)(x), step(x, hint), TOLERANCE)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_jit(kind):
    x = normal(0.2, (32, 4))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, P("data", "model")))
        found = jax.device_get(jax.jit(step)(sharded, 50.0))
    assert_trees_close(found, step(x, 50.0), TOLERANCE)


@pytest.mark.parametrize("settings", [{"virtual_batch_size": 8}, {"renorm": jbn.Renorm(2.0, 1.0)}])
def test_groups_and_renorm(as_elsewhere, settings):
    x = normal(40.0, (32, 4))
    found = step(x, 3.0, **settings)
    as_elsewhere()
    assert_trees_close(found, step(x, 3.0, **settings), 4 * TOLERANCE)


def test_only_a_tpu_has_the_branch(as_elsewhere):
    as_elsewhere()
    traced = jax.jit(step).trace(normal(0), 0.0)
    branches = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.case")
        for platform in ("tpu", "cuda", "cpu")
    }
    assert branches["tpu"] > branches["cuda"] == branches["cpu"]
