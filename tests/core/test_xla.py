"""Two sums at once: the same whether pairs are added first or not, both ways; and what that saves."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jbn
from jbn._core import xla
from tests.support.cases import assert_close, assert_trees_close, tolerance
from tests.support.compiling import optimized

TOLERANCE = tolerance(np.float32)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Where there are several, jit may have sharded x: only axes are cut that all of them could share."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield


# Shape, axes that are summed over, and along which of them how many pairs are added first.
CUTS = [
    ((32, 5), (0,), (0, 16)),
    ((12, 5), (0,), (0, 12)),
    ((13, 5), (0,), (0, 13)),
    ((17, 5), (0,), None),
    ((34, 5), (0,), None),
    ((3, 5), (0,), None),
    ((0, 5), (0,), None),
    ((8, 6, 28, 3), (0, 1, 2), (2, 14)),
    ((8, 6, 3, 3), (0, 1, 2), (1, 6)),
    ((8, 3, 17, 3), (0, 1, 2), (0, 8)),
    ((4, 3, 8, 14), (0, 2, 3), (3, 14)),
    ((5, 8), (), None),
]
cuts = pytest.mark.parametrize(("shape", "axes", "pairs"), CUTS, ids=[str(shape) for shape, *_ in CUTS])


def arrays(shape, number):
    random = np.random.default_rng(0)
    return [random.standard_normal(shape).astype(np.float32) for _ in range(number)]


@cuts
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, jnp.float8_e4m3fn])
def test_where_it_is_cut(shape, axes, pairs, dtype):
    assert xla._summation_chunk(jnp.zeros(shape, dtype), axes) == pairs


def test_what_is_not_converted_is_not_cut():
    assert xla._summation_chunk(jnp.zeros((32, 5)), (0,)) is None


@cuts
@pytest.mark.parametrize("weighted", [False, True])
def test_both_are_the_sums(shape, axes, pairs, weighted):
    first, second, weights = arrays(shape, 3)
    weights = np.abs(weights) if weighted else None
    x = jnp.zeros(shape, jnp.bfloat16)
    found = jax.jit(lambda a, b: xla.sum_pair(x, a, b, weights, axes))(first, second)
    for sums, values in zip(found, (first, second), strict=True):
        exact = np.sum(np.float64(values) * (1 if weights is None else weights), axes, keepdims=True)
        assert_close(sums, exact, TOLERANCE)


@cuts
def test_a_line_and_its_transpose(shape, axes, pairs):
    per_channel = [1 if axis in axes else size for axis, size in enumerate(shape)]
    constant, slope = arrays(per_channel, 2)
    offset, cotangent = arrays(shape, 2)
    x = jnp.zeros(shape, jnp.bfloat16)

    @jax.jit
    def both(*arguments):
        y, pullback = jax.vjp(lambda a, b, o: xla.broadcast_affine(x, a, b, o, axes), *arguments)
        return y, pullback(jnp.asarray(cotangent))

    y, back = both(constant, slope, offset)
    assert_close(y, constant + slope * offset, TOLERANCE)
    exact = [np.sum(np.float64(v), axes, keepdims=True) for v in (cotangent, cotangent * offset)]
    assert_trees_close(back, (*exact, slope * cotangent), TOLERANCE)


@pytest.mark.parametrize("varying", ["scale", "bias", "both"])
def test_parameters_per_example(varying):
    """The axis of the examples cannot be cut then, and none is left."""
    x = np.random.default_rng(0).standard_normal((16, 4)).astype(jnp.bfloat16)
    params = {
        name: np.linspace(0.5, 2, 16, dtype=np.float32)[:, None] * np.ones(4, np.float32)
        if varying in (name, "both")
        else np.float32([1, 2, 3, 4])
        for name in ("scale", "bias")
    }

    def loss(params, x):
        return jnp.sum(jnp.sin(jbn.batch_norm(params, None, x, use_running_average=False)[0]))

    gradient = jax.jit(jax.grad(loss))
    found, expected = (gradient(params, jnp.asarray(x, dtype)) for dtype in (jnp.bfloat16, jnp.float32))
    assert_trees_close(found, expected, tolerance(jnp.bfloat16))


@pytest.mark.parametrize("shape", [(64, 14, 14, 64), (4096, 256)])
def test_no_bfloat16_is_stored_as_float32(shape):
    """What this saves: XLA for CPUs would store x and the cotangent as float32, four times x's size."""
    x = jnp.zeros(shape, jnp.bfloat16)
    params, batch_stats = jbn.init(shape[-1])

    def step(params, x, cotangent):
        def run(params, x):
            return jbn.batch_norm(params, batch_stats, x, use_running_average=False)

        y, pullback, new = jax.vjp(run, params, x, has_aux=True)
        return y, pullback(cotangent), new

    compiled = optimized(step).lower(params, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * x.nbytes


def test_what_devices_may_share_is_cut_within_each_of_them(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert xla._summation_chunk(jnp.zeros((1024, 5), jnp.bfloat16), (0,)) == (0, 16)
    assert xla._summation_chunk(jnp.zeros((96, 5), jnp.bfloat16), (0,)) == (0, 12)
    assert xla._summation_chunk(jnp.zeros((72, 3, 16, 5), jnp.bfloat16), (0, 1, 2)) == (0, 9)
    assert xla._summation_chunk(jnp.zeros((100, 5), jnp.bfloat16), (0,)) is None


def test_a_sharded_axis_is_not_cut():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.zeros((16, 4), jnp.bfloat16), jax.NamedSharding(mesh, P("data")))
        assert xla._summation_chunk(x, (0,)) is None


def test_other_platforms_add_no_pairs():
    x = jnp.zeros((32, 4), jnp.bfloat16)

    def step(x):
        return jax.grad(lambda x: jbn.batch_norm(None, None, x, use_running_average=False)[0].sum())(x)

    for platform, pairs in (("cpu", True), ("tpu", False), ("cuda", False)):
        text = jax.jit(step).trace(x).lower(lowering_platforms=(platform,)).as_text()
        assert ("complex" in text) == pairs


def test_no_other_file_knows_platforms_or_counts_devices():
    words = re.compile(
        "platform_dependent|optimization_barrier|device_count|local_devices|jax.devices|default_backend"
        "|[\"'](cpu|gpu|cuda|rocm|tpu)[\"']"
    )
    package = Path(jbn.__file__).parent
    knowing = [file for file in package.rglob("*.py") if words.search(file.read_text(encoding="utf-8"))]
    assert knowing == [package / "_core" / "xla.py"]
