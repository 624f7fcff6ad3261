"""The linen layer is Flax's, except where Flax is wrong."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
import jbn.linen
from tests.support import reference
from tests.support.cases import CASES, assert_close, assert_trees_close, by_name, loosely, tolerance

PARITY = [case for case in CASES if case.location < 10]


def flax_mask(case):
    """Flax wants a mask that broadcasts to x by NumPy's rules, and has no weights."""
    return None if case.mask is None else case.weights() > 0


def dtypes(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


def run(kind, case, x, mask, train):
    """Initial variables, then y and variables after one call, with the variables of the case."""
    layer = kind(
        use_running_average=not train,
        axis=case.axis,
        momentum=case.momentum,
        epsilon=case.epsilon,
        use_scale=case.use_scale,
        use_bias=case.use_bias,
        **({"use_fast_variance": False} if kind is nn.BatchNorm else {}),
    )
    variables = jax.tree.map(
        jnp.asarray, {"params": case.make_params(), "batch_stats": case.make_batch_stats()}
    )
    initial = layer.init(jax.random.key(0), x)
    return initial, *layer.apply(variables, x, mask=mask, mutable=["batch_stats"])


@pytest.mark.quick
@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluate"])
@pytest.mark.parametrize(**by_name([case for case in PARITY if case.mask != "weights"]))
def test_parity_with_flax(case, train):
    x = np.where(case.weights() > 0, case.make_x(), 0).astype(case.dtype)

    @jax.jit
    def theirs_and_ours(x):
        with loosely():
            theirs = run(nn.BatchNorm, case, x, flax_mask(case), train)
        return theirs, run(jbn.linen.BatchNorm, case, x, case.make_mask(), train)

    (initial, y, new), (our_initial, our_y, our_new) = theirs_and_ours(x)
    assert our_y.dtype == y.dtype
    assert_close(our_y, y, tolerance(case.dtype), where=case.weights() > 0)
    assert_trees_close(our_new, new, tolerance(np.float32))
    if not np.issubdtype(case.dtype, np.complexfloating):  # where Flax starts the mean as a real zero
        chex.assert_trees_all_equal(our_initial, initial, strict=True)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16, jnp.float16])
def test_integers_come_out_in_the_dtype_of_flax(dtype, param_dtype):
    x = np.arange(12).reshape(4, 3).astype(np.int32)
    with jax.numpy_dtype_promotion("standard"):
        theirs = nn.BatchNorm(False, dtype=dtype, param_dtype=param_dtype).init_with_output(
            jax.random.key(0), x
        )
    ours = jbn.linen.BatchNorm(False, dtype=dtype, param_dtype=param_dtype).init_with_output(
        jax.random.key(0), x
    )
    assert dtypes(ours) == dtypes(theirs)


def test_it_is_the_functional_core():
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    layer = jbn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    y, new = layer.apply(variables, x, mutable=["batch_stats"])
    expected = jbn.batch_norm(variables["params"], variables["batch_stats"], x, use_running_average=False)
    assert_trees_close((y, new["batch_stats"]), expected, 0.0)


class Net(nn.Module):
    kind: type

    @nn.compact
    def __call__(self, x, train):
        x = self.kind(use_running_average=not train)(nn.Dense(4)(x))
        return self.kind(use_running_average=not train, use_bias=False)(nn.relu(x))


def test_changing_the_import_keeps_names_and_values():
    """A checkpoint of Flax's layers loads: the same tree, the same random numbers."""
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    theirs, ours = (
        Net(kind).init(jax.random.key(1), x, False) for kind in (nn.BatchNorm, jbn.linen.BatchNorm)
    )
    assert_trees_close(ours, theirs, 0.0)
    y = Net(jbn.linen.BatchNorm).apply(theirs, x, False)
    with jax.numpy_rank_promotion("allow"):
        assert_close(y, Net(nn.BatchNorm).apply(theirs, x, False), tolerance(np.float32))


def test_init_accepts_one_row_and_an_unbound_axis():
    layer = jbn.linen.BatchNorm(use_running_average=False, axis_name="data")
    y, variables = layer.init_with_output(jax.random.key(0), np.full((1, 3), 5, np.float32))
    np.testing.assert_array_equal(y, np.zeros((1, 3), np.float32))
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3, np.float32))


def test_init_normalizes_but_does_not_update():
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    y, variables = jbn.linen.BatchNorm(use_running_average=False).init_with_output(jax.random.key(0), x)
    assert_close(y, reference.normalize(x, -1, None, None, 1e-5), tolerance(np.float32))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3, np.float32))


def test_statistics_of_mixed_precision_stay_in_float32():
    """Flax rounds x to `dtype` first; here the statistics come from x as it is given."""
    x = (np.random.default_rng(0).standard_normal((64, 3)) + 1000).astype(np.float32)
    layer = jbn.linen.BatchNorm(use_running_average=False, dtype=jnp.bfloat16, momentum=0.0)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    _, new = layer.apply(variables, x, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert new["batch_stats"]["mean"].dtype == np.float32
    assert_close(new["batch_stats"]["var"], x.var(0, dtype=np.float64), tolerance(np.float32))


def test_a_real_mean_of_flax_takes_complex_input():
    x = np.random.default_rng(0).standard_normal((8, 2)).view(np.complex128).astype(np.complex64)
    layer = jbn.linen.BatchNorm(use_running_average=False, momentum=0.0)
    variables = layer.init(jax.random.key(0), x)
    variables["batch_stats"]["mean"] = np.zeros(1, np.float32)
    _, new = layer.apply(variables, x, mutable=["batch_stats"])
    assert_close(new["batch_stats"]["mean"], x.mean(0), tolerance(np.float32))


def test_the_mode_may_be_said_once_only():
    x = np.zeros((4, 2), np.float32)
    with pytest.raises(ValueError, match="use_running_average"):
        jbn.linen.BatchNorm().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="use_running_average"):
        jbn.linen.BatchNorm(use_running_average=True).init(jax.random.key(0), x, use_running_average=False)
