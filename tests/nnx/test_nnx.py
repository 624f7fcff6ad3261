"""The NNX layer is Flax's, except where Flax is wrong; under NNX's transforms it behaves as Flax's does."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.nnx
from tests.support.cases import CASES, assert_close, assert_trees_close, by_name, tolerance
from tests.support.versions import needs

X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
COTANGENT = np.random.default_rng(1).standard_normal((8, 3)).astype(np.float32)
ONE_AXIS = [c for c in CASES if len(c.features) == 1 and c.location < 10 and c.dtype != np.complex64]
KINDS = [nnx.BatchNorm, jbn.nnx.BatchNorm]


def make(kind, case, **settings):
    """The layer of the case, with its parameters and statistics."""
    layer = kind(
        *case.features,
        axis=case.axis,
        momentum=case.momentum,
        epsilon=case.epsilon,
        use_scale=case.use_scale,
        use_bias=case.use_bias,
        rngs=nnx.Rngs(0),
        **({"use_fast_variance": False} if kind is nnx.BatchNorm else {}),
        **settings,
    )
    for name, value in (case.make_params() | case.make_batch_stats()).items():
        getattr(layer, name)[...] = jnp.asarray(value)
    return layer


@pytest.mark.quick
@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluate"])
@pytest.mark.parametrize(**by_name([case for case in ONE_AXIS if case.mask != "weights"]))
def test_parity_with_flax(case, train, flax_promotion):
    x = jnp.asarray(np.where(case.weights() > 0, case.make_x(), 0).astype(case.dtype))
    theirs, ours = (make(kind, case, use_running_average=not train) for kind in KINDS)
    mask = None if case.mask is None else jnp.asarray(case.weights() > 0)
    y, our_y = nnx.jit(lambda *layers: [layer(x, mask=mask) for layer in layers])(theirs, ours)
    assert our_y.dtype == y.dtype
    assert_close(our_y, y, tolerance(np.float32 if train else case.dtype), where=case.weights() > 0)
    assert_trees_close(
        nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs)), tolerance(np.float32)
    )


def test_changing_the_class_keeps_the_random_numbers_of_all_layers():
    def net(kind):
        rngs = nnx.Rngs(0)
        scale = jax.nn.initializers.normal()
        return nnx.List([kind(3, scale_init=scale, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])

    theirs, ours = (nnx.to_pure_dict(nnx.state(net(kind), nnx.Param)) for kind in KINDS)
    assert_trees_close(ours, theirs, 0.0)


def test_train_and_eval_set_the_mode_and_a_call_has_precedence():
    layer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    layer.eval()
    assert_close(layer(X), X / np.sqrt(1 + 1e-5), tolerance(np.float32))
    np.testing.assert_array_equal(layer.mean[...], np.zeros(3, np.float32))
    normal = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5)
    assert_close(layer(X, use_running_average=False), normal, tolerance(np.float32))
    layer.train()
    assert_close(layer(X), normal, tolerance(np.float32))


@needs("flax", "0.12.5", "no nnx.view, or one that asks other things of a layer")
def test_a_view_has_a_mode_of_its_own():
    model = nnx.Sequential(jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    evaluating = nnx.view(model, use_running_average=True)
    assert_close(evaluating(X), X / np.sqrt(1 + 1e-5), tolerance(np.float32))
    model(X)
    np.testing.assert_array_equal(evaluating.layers[0].mean[...], model.layers[0].mean[...])
    assert float(abs(model.layers[0].mean[...]).max()) > 0


def expected_after(steps, momentum=0.9):
    return X.mean(0) * (1 - momentum**steps)


def test_jit_and_grad_update_once_per_step():
    layer = jbn.nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))
    loss = lambda layer, x: jnp.sum(layer(x) * COTANGENT)  # noqa: E731
    grads = nnx.jit(nnx.grad(loss))(layer, X)
    expected = jax.grad(
        lambda p: jnp.sum(jbn.batch_norm(p, None, X, use_running_average=False)[0] * COTANGENT)
    )(jbn.init(3)[0])
    assert_close(grads["scale"][...], expected["scale"], tolerance(np.float32))
    assert_close(grads["bias"][...], expected["bias"], tolerance(np.float32))
    assert_close(layer.mean[...], expected_after(1), tolerance(np.float32))


def test_remat_updates_once_per_step():
    layer = jbn.nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))
    nnx.grad(lambda layer: jnp.sum(nnx.remat(lambda layer, x: layer(x))(layer, X) * COTANGENT))(layer)
    assert_close(layer.mean[...], expected_after(1), tolerance(np.float32))


def test_scan_over_steps_carries_the_statistics():
    layer = jbn.nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))
    step = nnx.scan(lambda layer, x: (layer, layer(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    step(layer, jnp.broadcast_to(X, (10, *X.shape)))
    assert_close(layer.mean[...], expected_after(10), tolerance(np.float32))


def test_vmap_over_models_keeps_statistics_of_each():
    make_layers = nnx.vmap(lambda key: jbn.nnx.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(key)))
    layers = make_layers(jax.random.split(jax.random.key(0), 2))
    xs = jnp.stack([X, X + np.float32(1)])
    nnx.vmap(lambda layer, x: layer(x))(layers, xs)
    assert_close(layers.mean[...], np.stack([X.mean(0), X.mean(0) + 1]), tolerance(np.float32))


def test_split_and_merge_and_pickle_and_eval_shape():
    layer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    layer(X)
    graph, state = nnx.split(layer)
    for copy in (nnx.merge(graph, state), pickle.loads(pickle.dumps(layer)), nnx.clone(layer)):
        assert_close(copy(X, use_running_average=True), layer(X, use_running_average=True), 0.0)
    abstract = nnx.eval_shape(lambda: jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    assert nnx.state(abstract)["mean"].shape == (3,)


def test_checkpoints_of_flax_load_and_back(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    theirs = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with jax.numpy_rank_promotion("allow"):
        theirs(jnp.asarray(X))
    ours = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.to_pure_dict(nnx.state(theirs)))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", nnx.to_pure_dict(nnx.state(ours)))
    state = nnx.state(ours)
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(ours, state)
    np.testing.assert_array_equal(ours.mean[...], theirs.mean[...])
    nnx.update(theirs, nnx.state(ours))


def test_synchronised_over_a_mapped_axis():
    layer = jbn.nnx.BatchNorm(3, axis_name="data", momentum=0.0, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def step(state, x):
        layer = nnx.merge(graph, state)
        return layer(x), nnx.state(layer)

    y, new = jax.vmap(step, (None, 0), (0, None), axis_name="data")(state, X.reshape(4, 2, 3))
    assert_close(y.reshape(8, 3), (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5), tolerance(np.float32))
    assert_close(new["mean"][...], X.mean(0), tolerance(np.float32))


def test_options_on_top_of_flax():
    layer = jbn.nnx.BatchNorm(3, mean_init=jax.nn.initializers.ones, frozen=True, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.mean[...], np.ones(3, np.float32))
    grads = nnx.grad(lambda layer: jnp.sum(layer(X) * COTANGENT))(layer)
    np.testing.assert_array_equal(grads["scale"][...], np.zeros(3, np.float32))
    np.testing.assert_array_equal(layer.mean[...], np.ones(3, np.float32))
    live = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    assert_close(
        live(X, update_batch_stats=False), (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5), tolerance(np.float32)
    )
    np.testing.assert_array_equal(live.mean[...], np.zeros(3, np.float32))


def test_batch_moments_are_pooled_under_jit():
    layer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    jbn.nnx.keep_batch_moments(layer)
    step = nnx.jit(lambda layer, x: layer(x))
    step(layer, X[:6]), step(layer, X[6:])
    assert_trees_close(layer.batch_moments.get_value(), jbn.moments(X), tolerance(np.float32))
    jbn.nnx.keep_batch_moments(layer, keep=False)
    assert layer.batch_moments is None


def test_complex_input_keeps_its_complex_mean():
    x = (X + 1j * (X[::-1] + 5)).astype(np.complex64)
    layer = jbn.nnx.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    y = layer(x)
    assert_close(layer(x, use_running_average=True), np.asarray(y), tolerance(np.float32))


def test_momentum_may_follow_a_schedule():
    layer = jbn.nnx.BatchNorm(3, momentum=jnp.float32(0.9), rngs=nnx.Rngs(0))
    step = nnx.jit(lambda layer, x: layer(x))
    step(layer, X)
    assert_close(layer.mean[...], expected_after(1), tolerance(np.float32))
    layer.momentum = nnx.data(jnp.float32(0.0))
    step(layer, X)
    assert_close(layer.mean[...], X.mean(0), tolerance(np.float32))
