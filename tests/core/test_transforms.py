"""One update per step and the same answer under every transform of JAX, abstract and exported too."""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests.support.cases import assert_close, assert_trees_close
from tests.support.small_batch import BATCH_STATS, COTANGENT, MASK, PARAMS, TOLERANCE, X, layer


def train(params, batch_stats, x, **settings):
    return jbn.batch_norm(params, batch_stats, x, use_running_average=False, momentum=0.9, **settings)


def evaluate(params, batch_stats, x, **settings):
    return jbn.batch_norm(params, batch_stats, x, use_running_average=True, **settings)


def gradients(function, *arguments):
    """Of the first result of `function`, with a fixed cotangent; the second result comes along."""
    y, pullback, aux = jax.vjp(function, *arguments, has_aux=True)
    return y, aux, pullback(jnp.asarray(COTANGENT))


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_checkpoint_updates_once(mask):
    def step(params, x):
        return train(params, BATCH_STATS, x, mask=mask)

    plain = jax.jit(functools.partial(gradients, step))(PARAMS, X)
    assert_close(plain[1]["mean"], 0.1 * (X if mask is None else X[mask]).mean(0), TOLERANCE)
    assert_trees_close(
        jax.jit(functools.partial(gradients, jax.checkpoint(step)))(PARAMS, X), plain, TOLERANCE
    )


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_the_backward_pass_keeps_x_and_vectors_alone(mask):
    """x in its own dtype, the mask, and per-channel vectors."""
    x = X.astype(jnp.bfloat16)

    def normalize(params, x, mask):
        return train(params, BATCH_STATS, x, mask=mask)[0]

    pullback = jax.jit(lambda *arguments: jax.vjp(normalize, *arguments)[1])(PARAMS, x, mask)
    kept = sorted(str(jax.typeof(a)) for a in jax.tree.leaves(pullback) if a.size > 3)
    assert kept == [*(["bfloat16[8,3]"] if mask is None else ["bfloat16[8,3]", "bool[8,1]"])]


def test_scan_over_steps_carries_the_statistics():
    def step(batch_stats, x):
        y, batch_stats = train(PARAMS, batch_stats, x)
        return batch_stats, y

    new, y = jax.jit(lambda s: jax.lax.scan(step, s, np.broadcast_to(X, (10, 8, 3))))(BATCH_STATS)
    assert_close(new["mean"], X.mean(0) * (1 - 0.9**10), TOLERANCE)
    assert_close(y[-1], train(PARAMS, BATCH_STATS, X)[0], TOLERANCE)


def test_scan_over_layers_is_layer_after_layer():
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a, 3 * a]), (PARAMS, BATCH_STATS))

    def run(x, one):
        y, new = train(*one, x)
        return jnp.sin(y), new

    y, new = jax.jit(lambda x: jax.lax.scan(run, x, stacked))(jnp.asarray(X))
    x = jnp.asarray(X)
    for i in range(3):
        x, expected = run(x, jax.tree.map(lambda a, i=i: a[i], stacked))
        assert_trees_close(jax.tree.map(lambda a, i=i: a[i], new), expected, TOLERANCE)
    assert new["mean"].shape == (3, 3)
    assert_close(y, x, TOLERANCE)


def test_models_of_synchronised_examples():
    """vmap over three models of vmap over a batch axis: statistics (3, C)."""
    x = np.stack([X, 2 * X, X - 3])
    per_example = jax.vmap(
        functools.partial(train, axis_name="batch"),
        in_axes=(None, None, 0),
        out_axes=(0, None),
        axis_name="batch",
    )
    y, new = jax.jit(jax.vmap(per_example, in_axes=(None, None, 0)))(PARAMS, BATCH_STATS, x)
    assert new["mean"].shape == (3, 3)
    expected = [train(PARAMS, BATCH_STATS, part) for part in x]
    assert_close(y, np.stack([one for one, _ in expected]), TOLERANCE)
    assert_close(new["var"], np.stack([stats["var"] for _, stats in expected]), TOLERANCE)


def test_a_layer_of_examples_returns_one_state():
    """A per-example model under vmap, synchronised over it: its state does not depend on the example."""
    model = layer(use_running_average=False, axis_name="batch")
    variables = {"params": PARAMS, "batch_stats": BATCH_STATS}
    run = jax.vmap(
        functools.partial(model.apply, mutable=["batch_stats"]), (None, 0), (0, None), axis_name="batch"
    )
    y, new = jax.jit(run)(variables, X)
    expected, stats = train(PARAMS, BATCH_STATS, X)
    assert_close(y, expected, TOLERANCE)
    assert_trees_close(new["batch_stats"], stats, TOLERANCE)


@pytest.mark.parametrize("training", [True, False])
def test_shapes_without_arrays(training):
    x = jax.ShapeDtypeStruct((8, 3), jnp.bfloat16)
    model = layer(use_running_average=not training, dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    y, new = jax.eval_shape(functools.partial(model.apply, mutable=["batch_stats"]), variables, x)
    assert (y.shape, y.dtype) == ((8, 3), jnp.bfloat16)
    for array in jax.tree.leaves((variables, new)):
        chex.assert_shape(array, (3,))
        chex.assert_type(array, np.float32)
    y, new = jax.eval_shape(train if training else evaluate, *jax.eval_shape(lambda: jbn.init(3)), x)
    assert (y.shape, y.dtype) == ((8, 3), jnp.bfloat16)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, jbn.init(3)[1])


@pytest.mark.parametrize("door", ["core", "linen"])
def test_an_exported_evaluation_has_no_reduction_and_any_batch_size(door):
    stats = {"mean": np.array([1, 2, 3], np.float32), "var": np.array([0.5, 1, 2], np.float32)}

    def core(x):
        return evaluate(PARAMS, stats, x)[0]

    def linen(x):
        return layer().apply({"params": PARAMS, "batch_stats": stats}, x, use_running_average=True)

    run = core if door == "core" else linen
    (batch,) = jax.export.symbolic_shape("batch")
    exported = jax.export.export(jax.jit(run))(jax.ShapeDtypeStruct((batch, 3), np.float32))
    assert "stablehlo.reduce" not in exported.mlir_module()
    assert_close(exported.call(X)[:1], exported.call(X[:1]), TOLERANCE)
    assert_close(exported.call(X), run(X), TOLERANCE)


@pytest.mark.parametrize("masked", [False, True])
def test_an_exported_training_step_takes_any_batch_size(masked):
    def step(x, mask):
        return train(PARAMS, BATCH_STATS, x, mask=mask if masked else None)

    (batch,) = jax.export.symbolic_shape("batch", constraints=["batch >= 2"])
    shapes = (jax.ShapeDtypeStruct((batch, 3), np.float32), jax.ShapeDtypeStruct((batch,), bool))
    exported = jax.export.export(jax.jit(step))(*shapes)
    for rows in (4, 8):
        expected = step(X[:rows], MASK[:rows])
        assert_trees_close(exported.call(X[:rows], MASK[:rows]), expected, TOLERANCE)


AROUND = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x: jax.lax.scan(lambda carry, _: (carry, f(x)), 0, None, length=1)[1][0],
    "cond": lambda f: lambda x: jax.lax.cond(True, f, lambda x: x, x),
    "map": lambda f: lambda x: jax.lax.map(f, x[None])[0],
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("devices", [4, 16])
def test_a_staged_vmap_is_differentiable_twice(around, devices):
    """JAX runs the rule of what jit, scan and checkpoint staged when the axis name is no longer bound."""
    rng = np.random.default_rng(0)
    x, cotangent = (rng.standard_normal((devices, 5, 3)).astype(np.float32) for _ in range(2))
    layer = functools.partial(jbn.batch_norm, jbn.init(3)[0], None, use_running_average=False)
    cut = around(jax.vmap(lambda x: layer(x, axis_name="data")[0], axis_name="data"))

    def gradients(y):
        first = jax.grad(lambda x: jnp.sum(y(x) ** 2 * cotangent))
        return jax.jit(lambda x: (first(x), jax.grad(lambda x: jnp.sum(first(x) * cotangent))(x)))(x)

    expected = gradients(lambda x: layer(x)[0])
    assert_trees_close(gradients(cut), expected, TOLERANCE)
