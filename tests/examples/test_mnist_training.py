"""The MNIST example trains: by which optimizer, what a run tells, and the same on many devices."""

import functools

import jax
import numpy as np
import optax
import pytest

import mnist
import models
from curves import draw_curves
from errors import UsageError
from mnist_options import Config, with_preset
from tests.support import mnist_runs
from tests.support.mnist_runs import metrics, saved_state

# pytest finds a fixture by its name in the file of the test.
compile_once, data_dir, options = mnist_runs.compile_once, mnist_runs.data_dir, mnist_runs.options


@pytest.mark.usefixtures("standard_promotion")
def test_weight_decay_is_for_kernels_alone():
    init = functools.partial(models.Cnn().init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.uint8))
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes["params"])
    optimizer, _ = mnist.make_optimizer(with_preset(Config()), total_steps=100)
    no_gradient = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(no_gradient, jax.jit(optimizer.init)(params), params)
    moved, still = [], []
    for path, update in jax.tree.leaves_with_path(updates):
        (moved if (update < 0).all() else still).append(path[-1].key)
        assert (update < 0).all() or (update == 0).all()
    assert moved == ["kernel"] * 5
    assert sorted(still) == ["bias"] * 5 + ["scale"] * 4


@pytest.mark.usefixtures("standard_promotion")
def test_the_mlp_is_trained_by_adam_for_1000_steps(data_dir):
    config = with_preset(Config(model="mlp", data_dir=data_dir))
    assert (config.epochs, config.max_steps) == (None, 1000)
    optimizer, schedule = mnist.make_optimizer(config, total_steps=1000)
    params = {"kernel": np.ones((2, 3), np.float32)}
    gradient = {"kernel": np.full((2, 3), 0.5, np.float32)}
    ours, _ = optimizer.update(gradient, optimizer.init(params), params)
    adam, _ = optax.adam(0.001).update(gradient, optax.adam(0.001).init(params), params)
    np.testing.assert_array_equal(ours["kernel"], adam["kernel"])
    assert schedule(999) == 0.001


@pytest.mark.training
def test_metrics_tell_the_run(options, monkeypatch):
    losses, train_on = [], mnist.Run._train_on

    def watched(run, rows):
        losses.append(train_on(run, rows))
        return losses[-1]

    monkeypatch.setattr(mnist.Run, "_train_on", watched)
    accuracy = mnist.train(Config(**options))
    rows = metrics(options["output"])
    assert [int(row["step"]) for row in rows] == [2, 4, 5, 6, 8, 10]
    assert [int(row["epoch"]) for row in rows] == [1, 1, 1, 2, 2, 2]
    assert [bool(row["test_accuracy"]) for row in rows] == [False, False, True, False, False, True]
    assert float(rows[-1]["test_accuracy"]) == accuracy
    assert len(losses) == 10
    assert np.isfinite(losses).all()
    assert [float(row["loss"]) for row in rows] == [float(losses[int(row["step"]) - 1]) for row in rows]
    draw_curves(options["output"] / "metrics.csv", options["output"] / "curves.png")
    assert (options["output"] / "curves.png").read_bytes().startswith(b"\x89PNG")
    step, state = saved_state(options)
    assert step == 10
    for layer, stats in state.batch_stats.items():
        for name, values in stats.items():
            found = [float(rows[-1][f"{layer}/{name}/p{percent}"]) for percent in (10, 50, 90)]
            np.testing.assert_array_equal(found, np.percentile(values, (10, 50, 90)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: expected 1 or more"),
        ({"epochs": 0}, "--epochs 0: expected 1 or more"),
        ({"train_size": 71}, "--train-size 71: .* has 70 images"),
        ({"seed": -1}, "--seed -1: expected 0 or more"),
        ({"momentum": 1.5}, "--momentum 1.5: expected 0 to 1"),
        ({"devices": 9}, "--devices 9: there are 8 here"),
    ],
)
def test_an_option_out_of_range_is_named(options, changes, message):
    with pytest.raises(UsageError, match=message):
        mnist.train(Config(**options | changes))


@pytest.mark.training
def test_8_devices_train_as_one(options):
    """Every way, on batches of 13 rows, which leave one device a single row and another none.

    With four instruction sets and five seeds, losses are at most 3e-7 of themselves apart, moments of up to
    0.04 at most 1.4e-8, and the ten losses of a run differ by 1.3 or more.
    """
    one_losses, one_moment = train_10_steps(options, devices=1, parallel="jit")
    for way in ("jit", "shard_map", "pmap"):
        losses, moment = train_10_steps(options, devices=8, parallel=way)
        np.testing.assert_allclose(losses, one_losses, rtol=1e-5, err_msg=way)
        assert np.ptp(losses) > 0.1
        # Adam's steps hide gradients that are 8 times too large; its first moment shows them.
        for ours, expected in zip(jax.tree.leaves(moment), jax.tree.leaves(one_moment), strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-7, err_msg=way)


def train_10_steps(options, **changes):
    """The losses, and Adam's first moment (a tenth of the gradients) after the first step."""
    run = mnist.Run(with_preset(Config(**options | changes)))
    losses = []
    for step in range(10):
        losses.append(run.placement.get(run._train_on(np.arange(13) + 5 * step)))
        if step == 0:
            moment = run.placement.get(run.state.opt_state[0].mu)
    run.close()
    return np.array(losses), moment
