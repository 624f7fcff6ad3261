"""The train step and the runs of the ResNet example: one update of everything, and nothing lost."""

import csv
import functools
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("safetensors")

import optax

import resnet.step
import resnet.train
from batches import Batch
from errors import Interrupted, UsageError
from resnet.data import RandomCrop, training_batches
from resnet.model import load_model
from resnet.options import Config
from resnet.step import make_evaluation_step
from runs import Checkpoints
from tests.support import mnist_runs, resnet_runs
from tests.support.cases import assert_close, assert_trees_close
from tests.support.resnet_runs import BATCH_SIZE, CLASSES, first_bytes, model_file, new_run

pytestmark = pytest.mark.training
# pytest finds a fixture by its name in the file of the test.
compile_once, data_dir, options = mnist_runs.compile_once, resnet_runs.data_dir, resnet_runs.options
one_block_for_each_stage = resnet_runs.one_block_for_each_stage


def after_a_step(options, images, labels, **changes):
    """The run, its state before and after one step, and what the step tells, as NumPy arrays."""
    run = new_run(options, output=options["output"] / str(len(list(options["output"].glob("*")))), **changes)
    before = run.placement.get(run.state)
    batch = Batch(images, labels, np.ones(len(labels), bool))
    report = run.train_on(batch)
    after = run.placement.get((run.state, report))
    run.close()
    return run, before, *after


def first_norm_input(run, params, images):
    """What the first batch norm normalizes, in float64: the first convolution knows no other row."""
    variables = {"params": params, "batch_stats": run.placement.get(run.state.batch_stats)}
    keep = {
        "capture_intermediates": lambda module, _: module.name == "conv_init",
        "mutable": ["intermediates"],
    }
    _, found = run.model.apply(variables, images, train=False, **keep)
    return np.asarray(found["intermediates"]["conv_init"]["__call__"][0], np.float64)


def test_accumulated_statistics_are_updated_once_by_the_whole_batch(options):
    images, labels = first_bytes(BATCH_SIZE)
    run, before, after, report = after_a_step(options, images, labels, accumulate=3)
    x = first_norm_input(run, before.params, images)
    moments = report.moments["batch_moments"]["bn_init"]["moments"]
    assert_close(moments.mean, x.mean((0, 1, 2)), 1e-5)
    assert_close(moments.var, x.var((0, 1, 2)), 1e-5)
    assert_close(after.batch_stats["bn_init"]["mean"], 0.1 * x.mean((0, 1, 2)), 1e-5)
    assert_close(after.batch_stats["bn_init"]["var"], 0.9 + 0.1 * x.var((0, 1, 2)), 1e-5)


def test_accumulated_gradients_are_the_mean_of_the_micro_batches(options):
    """By the trace of the optimizer after one step: the gradient, and weight decay."""
    images, labels = first_bytes(BATCH_SIZE)
    _, _, whole, report = after_a_step(options, images, labels, accumulate=2)
    parts = [after_a_step(options, images[i::2], labels[i::2], batch_size=BATCH_SIZE // 2) for i in range(2)]
    expected = jax.tree.map(lambda *traces: np.mean(traces, axis=0), *(trace(part[2]) for part in parts))
    assert_trees_close(trace(whole), expected, 1e-5)
    assert_close(report.loss, np.mean([part[3].loss for part in parts]), 1e-5)
    assert any(np.ptp(leaf) > 1e-2 for leaf in jax.tree.leaves(expected))


def trace(state):
    return state.opt_state.inner_state[1][0].trace


def test_weight_decay_leaves_batch_norm_out(options):
    run = new_run(options, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, run.state.params)
    _, state = run.optimizer.update(zeros, run.state.opt_state, run.state.params)
    for path, decay in jax.tree.leaves_with_path(state.inner_state[1][0].trace):
        name = jax.tree_util.keystr(path)
        expected = functools.reduce(lambda tree, key: tree[key.key], path, run.state.params)
        is_norm = "BatchNorm" in name or "bn_init" in name or "norm_proj" in name
        np.testing.assert_array_equal(decay, 0 * expected if is_norm else 0.5 * expected, err_msg=name)
    run.close()


def test_lars_scales_kernels_alone(options):
    run = new_run(options, optimizer="lars", weight_decay=0.5, warmup_epochs=0.0)
    ones = jax.tree.map(jnp.ones_like, run.state.params)
    updates, _ = run.optimizer.update(ones, run.state.opt_state, ones)
    rate = float(run.schedule(0))
    assert_close(updates["Dense_0"]["bias"], np.full(len(CLASSES), -rate, np.float32), 1e-6)
    assert_close(updates["bn_init"]["scale"], np.full(options["width"], -rate, np.float32), 1e-6)
    kernel = np.asarray(updates["Dense_0"]["kernel"])
    # |p| (g + wd p) / |g + wd p| is p where p and g are 1: what is left is the trust coefficient.
    assert_close(kernel, np.full(kernel.shape, -0.001 * rate, np.float32), 1e-6)
    run.close()


def test_8_devices_train_as_one(options):
    images, labels = first_bytes(16)
    _, _, one, one_report = after_a_step(options, images, labels, batch_size=16)
    _, _, all_eight, report = after_a_step(options, images, labels, batch_size=16, devices=8)
    assert_close(report.loss, one_report.loss, 1e-5)
    assert_trees_close(trace(all_eight), trace(one), 1e-4)
    assert_trees_close(all_eight.batch_stats, one.batch_stats, 1e-5)


def test_the_policy_of_checkpoint_changes_no_number(options):
    images, labels = first_bytes(BATCH_SIZE)
    _, _, plain, plain_report = after_a_step(options, images, labels)
    _, _, kept, report = after_a_step(options, images, labels, checkpoint_policy=True)
    assert_close(report.loss, plain_report.loss, 1e-6)
    assert_trees_close(trace(kept), trace(plain), 1e-5)
    assert_trees_close(kept.batch_stats, plain.batch_stats, 1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_batch_with_nan_gradients_changes_nothing_and_is_counted(options, monkeypatch, optimizer):
    real = optax.softmax_cross_entropy

    def spoiled(logits, targets):
        return jnp.where(targets[:, 3] > 0.5, jnp.nan, 1.0) * real(logits, targets)

    monkeypatch.setattr(resnet.step.optax, "softmax_cross_entropy", spoiled)
    images, labels = first_bytes(BATCH_SIZE)
    run = new_run(options, optimizer=optimizer, average=0.5)
    ones = np.ones(BATCH_SIZE, bool)
    for _ in range(2):  # in the first the learning rate is 0: parameters and average are the same after it
        run.train_on(Batch(images, np.zeros_like(labels), ones))
    before = run.placement.get(run.state)
    report = run.train_on(Batch(images, np.full_like(labels, 3), ones))
    after = run.placement.get(run.state)
    for name in ("params", "batch_stats", "average"):
        mnist_runs.assert_same_bits(getattr(after, name), getattr(before, name))
    mnist_runs.assert_same_bits(after.opt_state.inner_state, before.opt_state.inner_state)
    assert (after.opt_state.total_notfinite, before.opt_state.total_notfinite) == (1, 0)
    rows = []
    monkeypatch.setattr(run.log, "write", rows.append)
    run._log(report)
    assert rows[0]["learning_rate"] == float(run.schedule(1)) != float(run.schedule(2))
    run.train_on(Batch(images, np.zeros_like(labels), ones))
    later = run.placement.get(run.state)
    assert later.opt_state.notfinite_count == 0
    assert any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (later.params, after.params)), strict=True)
    )
    run.close()


def test_a_run_whose_gradients_stay_nan_is_stopped(options, monkeypatch):
    monkeypatch.setattr(resnet.train, "TOO_MANY", 2)
    monkeypatch.setattr(resnet.step.optax, "softmax_cross_entropy", lambda logits, _: jnp.nan * logits[:, 0])
    with pytest.raises(UsageError, match="step 2: gradients were NaN or inf in 2 steps in a row"):
        resnet.train.train(Config(**options))


def test_ways_to_normalize_differ(options):
    """In how they train; the first step of renorm is plain batch norm, and its limits open later."""
    images, labels = first_bytes(BATCH_SIZE)
    losses = {}
    for norm in ("sync", "ghost", "renorm"):
        run = new_run(options, norm=norm, ghost_size=4, output=options["output"] / norm)
        reports = [run.train_on(Batch(images, labels, np.ones(BATCH_SIZE, bool))) for _ in range(3)]
        losses[norm] = [float(report.loss) for report in reports]
        run.close()
    assert np.isfinite(list(losses.values())).all()
    assert losses["renorm"][0] == pytest.approx(losses["sync"][0], rel=1e-5)
    assert abs(losses["renorm"][2] - losses["sync"][2]) > 1e-4
    assert abs(losses["ghost"][0] - losses["sync"][0]) > 1e-4


@pytest.mark.parametrize(("step", "r_max", "d_max"), [(0, 1, 0), (100, 1, 0), (150, 2, 2.5), (500, 3, 5)])
@pytest.mark.usefixtures("flax_promotion")
def test_limits_of_renorm_open_in_the_second_tenth(step, r_max, d_max):
    limits = resnet.step.renorm_limits(jnp.int32(step), 1000)
    np.testing.assert_allclose([limits.r_max, limits.d_max], [r_max, d_max], rtol=1e-6)


def test_evaluation_counts_what_is_not_masked(options):
    run = new_run(options)
    images, labels = first_bytes(8)
    variables, mask = run.variables(), np.arange(8) < 6
    logits = np.asarray(run.model.apply(variables, images, train=False))[mask]
    rank = np.sum(logits >= np.take_along_axis(logits, labels[mask, None], 1), 1)
    # 6 classes: all but the last are among the first five.
    found = make_evaluation_step(run.model)(variables, Batch(images, labels, mask))
    np.testing.assert_array_equal(found, [np.sum(rank == 1), np.sum(rank <= 5), 6])
    same = jax.tree.map(jnp.zeros_like, variables)
    found = make_evaluation_step(run.model)(same, Batch(images, labels, mask))
    np.testing.assert_array_equal(found, [0, 0, 6])  # who knows nothing is right by no luck
    run.close()


def test_a_run_that_is_preempted_goes_on_bit_for_bit(options, tmp_path, monkeypatch):
    options |= {"average": 0.5, "recalibrate_batches": 2, "checkpoint_every": 2}
    whole = options | {"output": tmp_path / "whole"}
    accuracy = resnet.train.train(Config(**whole))
    train_on = resnet.train.Run.train_on

    def preempted_at_step_5(run, batch):
        if run.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return train_on(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(resnet.train.Run, "train_on", preempted_at_step_5)
        with pytest.raises(Interrupted, match="stopped at step 5 of 6") as stopped:
            resnet.train.train(Config(**options))
    assert stopped.value.status == 143
    assert not model_file(options).exists()
    count = resnet.step.accuracy

    def preempted_in_evaluation(step, variables, batches, placement, **asked):
        signal.raise_signal(signal.SIGTERM)
        return count(step, variables, batches, placement, **asked)

    with monkeypatch.context() as patch:
        patch.setattr(resnet.train, "accuracy", preempted_in_evaluation)
        with pytest.raises(Interrupted, match="stopped at step 6 of 6"):
            resnet.train.train(Config(**options | {"resume": True}))
    assert resnet.train.train(Config(**options | {"resume": True})) == accuracy
    assert model_file(options).read_bytes() == model_file(whole).read_bytes()
    tables = [(folder["output"] / "metrics.csv").read_text() for folder in (options, whole)]
    assert tables[0] == tables[1]
    rows = list(csv.DictReader(tables[0].splitlines()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [bool(row["drift"]) for row in rows] == [False, False, True, False, False, True]
    assert float(rows[-1]["loss"]) != float(rows[0]["loss"])
    norms = list(csv.DictReader((options["output"] / "norms.csv").read_text().splitlines()))
    assert float(norms[0]["drift"]) == float(rows[-1]["drift"])
    with pytest.raises(UsageError, match="began with seed 0, and is now given seed 1"):
        resnet.train.train(Config(**options | {"resume": True, "seed": 1}))


def test_a_full_disk_ends_the_run_with_one_line(tmp_path, monkeypatch):
    """A checkpoint is written in the background: what failed there comes with the next call."""
    checkpoints = Checkpoints(tmp_path, create=True)
    close = checkpoints._manager.close

    def failed():
        close()
        raise ValueError("Failed writing: No space left on device\nmore")

    monkeypatch.setattr(checkpoints._manager, "close", failed)
    with pytest.raises(UsageError, match=r"a checkpoint cannot be written: .* No space left on device$"):
        checkpoints.close()


def test_resuming_nothing_begins_a_run(options, capsys):
    """A requeued job has one command; a checkpoint that was being written when it was killed is none."""
    (options["output"] / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    run = new_run(options, resume=True)
    assert run.step == 0
    assert f"--resume: {options['output']} holds no checkpoint" in capsys.readouterr().out
    run.train_on(next(run.batches))
    run.close()


def test_the_model_is_the_average_with_statistics_measured_anew(options):
    options |= {"average": 0.5, "recalibrate_batches": 2, "epochs": 1}
    resnet.train.train(Config(**options))
    run = new_run(options, resume=True)
    _, variables, about = load_model(model_file(options))
    mnist_runs.assert_same_bits(variables["params"], run.placement.get(run.state.average))
    assert about["classes"] == list(CLASSES)
    crop = RandomCrop(options["image_size"], smallest=options["crop_scale"], flip=True)
    again = training_batches(run.pictures, crop, BATCH_SIZE, seed=0)
    for _ in range(run.step):
        next(again)
    images = np.concatenate([next(again).images for _ in range(2)])
    x = first_norm_input(run, variables["params"], images)
    assert_close(variables["batch_stats"]["bn_init"]["mean"], x.mean((0, 1, 2)), 1e-5)
    assert_close(variables["batch_stats"]["bn_init"]["var"], x.var((0, 1, 2)), 1e-5)
    run.close()


def test_tensorboard_gets_the_numbers(options):
    pytest.importorskip("tensorboardX")
    resnet.train.train(Config(**options | {"tensorboard": True, "epochs": 1}))
    (file,) = Path(options["output"] / "tensorboard").iterdir()
    content = file.read_bytes()
    assert all(name in content for name in (b"learning_rate", b"test_accuracy", b"norms/bn_init/drift"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: expected 1 or more"),
        ({"label_smoothing": 1.5}, "--label-smoothing 1.5: expected 0 to 1"),
        ({"workers": -1}, "--workers -1: expected 0 or more"),
        ({"center_crop": 0.0}, "--center-crop 0.0: expected more than 0"),
        (
            {"batch_size": 12, "devices": 8},
            "--batch-size 12: expected a multiple of 8, devices x --accumulate",
        ),
        (
            {"norm": "ghost", "ghost_size": 4, "accumulate": 2},
            "--ghost-size 4: expected a divisor of 6, --batch-size / --accumulate",
        ),
        ({"data_dir": Path("none")}, "none/train: no such folder of class folders"),
    ],
)
def test_what_does_not_fit_is_named(options, changes, message):
    with pytest.raises(UsageError, match=message):
        resnet.train.train(Config(**options | changes))
