"""The MNIST example: its data files, its batches, and runs that stop, go on and spread over devices."""

import csv
import functools
import gzip
import hashlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import batches
import idx
import mnist
import models
import parallel
from curves import draw_curves
from errors import Interrupted, UsageError
from mnist_options import Config, with_preset

EXAMPLES = Path(mnist.__file__).parent
TRAIN_SIZE, TEST_SIZE, BATCH_SIZE = 70, 30, 16  # 5 steps an epoch, the last of 6 images


def idx_bytes(values):
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    return header + values.astype(np.uint8).tobytes()


def write_data(folder, *, zipped=False):
    """A small set in MNIST's form: images of 8 x 8 pixels in which column `label` is bright."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, count in (("train", TRAIN_SIZE), ("t10k", TEST_SIZE)):
        labels = rng.integers(0, 8, count)
        images = rng.integers(0, 60, (count, 8, 8))
        images[np.arange(count), :, labels] += 150
        for name, values in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            content = idx_bytes(values)
            path = folder / f"{prefix}-{name}{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    """Runs of the same program, also in another process, compile it once."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mnist") / "data")


@pytest.fixture
def options(data_dir, tmp_path, monkeypatch, standard_promotion):
    """Options of a run of 2 epochs, 10 steps, whose metrics have a row for every second step."""
    monkeypatch.setattr(mnist, "LOG_EVERY", 2)
    monkeypatch.setattr(mnist, "draw_curves", lambda metrics, picture: None)  # takes a second
    return {
        "model": "mlp",
        "epochs": 2,
        "batch_size": BATCH_SIZE,
        "data_dir": data_dir,
        "output": tmp_path / "run",
        "devices": 1,
    }


def saved_state(options):
    """The step and the state of a run's latest checkpoint."""
    run = mnist.Run(with_preset(Config(**options | {"resume": True})))
    run.close()
    return run.step, run.placement.get(run.state)


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


# Data files


def test_the_repository_holds_the_original_mnist():
    md5 = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
    for name, expected in md5.items():
        content = gzip.decompress((EXAMPLES / "data" / "mnist" / f"{name}.gz").read_bytes())
        assert hashlib.md5(content).hexdigest() == expected, name


def test_gzipped_and_plain_files_hold_the_same(data_dir, tmp_path):
    plain, zipped = (idx.load_splits(path) for path in (data_dir, write_data(tmp_path / "z", zipped=True)))
    assert_same_bits(plain, zipped)
    train, test = plain
    assert train.images.shape == (TRAIN_SIZE, 8, 8, 1)
    assert test.labels.shape == (TEST_SIZE,)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def drop_a_label(path):
    path.write_bytes(idx_bytes(np.zeros(TRAIN_SIZE - 1)))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte", Path.unlink, "no such file, nor train-images-idx3-ubyte.gz"),
        ("train-images-idx3-ubyte", cut, "truncated, 4479 bytes of data for shape (70, 8, 8), expected 4480"),
        ("t10k-labels-idx1-ubyte", lambda path: path.write_bytes(b""), "starts with bytes (none), expected"),
        ("t10k-labels-idx1-ubyte", lambda path: path.write_bytes(b"\0\0\x08\x01"), "truncated, its header"),
        (
            "train-images-idx3-ubyte",
            lambda path: path.write_bytes(b"PNG."),
            "starts with bytes 50 4e 47 2e",
        ),
        ("train-images-idx3-ubyte", drop_a_label, "expected 00 00 08 03"),
        ("train-labels-idx1-ubyte", drop_a_label, "holds 69 labels for the 70 images beside it"),
        (
            "train-labels-idx1-ubyte",
            lambda path: path.write_bytes(idx_bytes(np.full(TRAIN_SIZE, 10))),
            "holds label 10, expected 0 to 9",
        ),
        (
            "t10k-images-idx3-ubyte",
            lambda path: path.write_bytes(idx_bytes(np.zeros((TEST_SIZE, 8, 9)))),
            "holds images of 8x9 pixels, but the training images have 8x8",
        ),
        (
            "train-images-idx3-ubyte",
            lambda path: path.write_bytes(path.read_bytes() + b"\0"),
            "too long, 4481 bytes of data for shape (70, 8, 8), expected 4480",
        ),
        (
            "train-images-idx3-ubyte",
            lambda path: path.write_bytes(gzip.compress(path.read_bytes())[:-20]),
            "truncated, its gzip stream ends early",
        ),
        ("train-images-idx3-ubyte", lambda path: path.write_bytes(b"\x1f\x8b1234567890"), "cannot be read"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, name, damage, message):
    folder = write_data(tmp_path / "data")
    damage(folder / name)
    with pytest.raises(UsageError) as caught:
        idx.load_splits(folder)
    text = str(caught.value)
    assert text.startswith(str(folder / name))
    assert message in text
    assert "\n" not in text


# Batches


def test_an_epoch_goes_through_every_image_once_in_an_order_of_its_own(data_dir):
    train, _ = idx.load_splits(data_dir)
    order = batches.epoch_order(3, 1, TRAIN_SIZE)
    np.testing.assert_array_equal(np.sort(order), np.arange(TRAIN_SIZE))
    np.testing.assert_array_equal(order, batches.epoch_order(3, 1, TRAIN_SIZE))
    assert (order != batches.epoch_order(3, 2, TRAIN_SIZE)).any()
    assert (order != batches.epoch_order(4, 1, TRAIN_SIZE)).any()
    batch = batches.take(train, order[-6:], BATCH_SIZE)
    assert batch.images.shape == (BATCH_SIZE, 8, 8, 1)
    np.testing.assert_array_equal(batch.mask, [True] * 6 + [False] * 10)
    np.testing.assert_array_equal(batch.images[:6], train.images[order[-6:]])
    np.testing.assert_array_equal(batch.labels[:6], train.labels[order[-6:]])


def test_processes_take_disjoint_parts_of_the_same_batch(data_dir):
    train, _ = idx.load_splits(data_dir)
    rows = np.arange(10, 23)
    whole = batches.take(train, rows, BATCH_SIZE)
    parts = [batches.take(train, rows, BATCH_SIZE, part=part, num_parts=2) for part in range(2)]
    assert_same_bits(jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts), whole)


def test_a_padded_batch_trains_as_the_bare_one(data_dir):
    train, _ = idx.load_splits(data_dir)
    model, rows = models.Mlp(), np.arange(20, 26)
    variables = jax.jit(model.init, static_argnames="train")(jax.random.key(0), train.images[:1], train=False)
    state = parallel.State(variables["params"], variables["batch_stats"], None)
    results = [
        jax.jit(lambda batch: parallel.loss_and_gradients(model, state, batch))(
            batches.take(train, rows, size)
        )
        for size in (6, BATCH_SIZE)
    ]
    for bare, padded in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.isfinite(bare).all()
        np.testing.assert_allclose(padded, bare, rtol=1e-5, atol=1e-6)


# Training


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
def test_the_article_trains_its_mlp_by_adam_for_1000_steps(data_dir):
    config = with_preset(Config(model="mlp", data_dir=data_dir))
    assert (config.epochs, config.max_steps) == (None, 1000)
    optimizer, schedule = mnist.make_optimizer(config, total_steps=1000)
    params = {"kernel": np.ones((2, 3), np.float32)}
    gradient = {"kernel": np.full((2, 3), 0.5, np.float32)}
    ours, _ = optimizer.update(gradient, optimizer.init(params), params)
    adam, _ = optax.adam(0.001).update(gradient, optax.adam(0.001).init(params), params)
    np.testing.assert_array_equal(ours["kernel"], adam["kernel"])
    assert schedule(999) == 0.001


def test_metrics_tell_the_run(options):
    accuracy = mnist.train(Config(**options))
    rows = metrics(options["output"])
    assert [int(row["step"]) for row in rows] == [2, 4, 5, 6, 8, 10]
    assert [int(row["epoch"]) for row in rows] == [1, 1, 1, 2, 2, 2]
    assert [bool(row["test_accuracy"]) for row in rows] == [False, False, True, False, False, True]
    assert float(rows[-1]["test_accuracy"]) == accuracy > 0.5
    assert 0 < float(rows[-1]["loss"]) < float(rows[0]["loss"])
    draw_curves(options["output"] / "metrics.csv", options["output"] / "curves.png")
    assert (options["output"] / "curves.png").read_bytes().startswith(b"\x89PNG")
    step, state = saved_state(options)
    assert step == 10
    for layer, stats in state.batch_stats.items():
        for name, values in stats.items():
            found = [float(rows[-1][f"{layer}/{name}/p{percent}"]) for percent in (10, 50, 90)]
            np.testing.assert_array_equal(found, np.percentile(values, (10, 50, 90)))


def test_a_stopped_run_goes_on_bit_for_bit(options, tmp_path, monkeypatch, capsys):
    whole = options | {"output": tmp_path / "whole"}
    accuracy = mnist.train(Config(**whole))
    train_on = mnist.Run._train_on

    def interrupted_at_step_7(run, rows):
        if run.step == 6:
            signal.raise_signal(signal.SIGINT)
        return train_on(run, rows)

    with monkeypatch.context() as patch:
        patch.setattr(mnist.Run, "_train_on", interrupted_at_step_7)
        with pytest.raises(Interrupted, match="stopped at step 7 of 10"):
            mnist.train(Config(**options))
    assert saved_state(options)[0] == 7
    # A killed program may have written rows that no checkpoint has, the last one (here of step 10) in part.
    last_row = (options["output"] / "metrics.csv").read_text().splitlines()[-1]
    with (options["output"] / "metrics.csv").open("a") as file:
        file.write(f"8{last_row[1:]}\n1")
    assert mnist.train(Config(**options | {"resume": True})) == accuracy
    assert "at step 7 of 10" in capsys.readouterr().out
    assert_same_bits(saved_state(options), saved_state(whole))
    assert metrics(options["output"]) == metrics(whole["output"])
    # And a finished one has nothing to do but tell.
    assert mnist.train(Config(**options | {"resume": True})) == accuracy
    assert metrics(options["output"]) == metrics(whole["output"])


def test_a_new_run_keeps_the_earlier_one(options):
    for epochs in (1, 2):
        mnist.train(Config(**options | {"epochs": epochs}))
    for epochs, folder in ((1, options["output"] / "earlier-1"), (2, options["output"])):
        assert saved_state(options | {"epochs": epochs, "output": folder})[0] == 5 * epochs
        assert len(metrics(folder)) == 3 * epochs


def test_a_resumed_run_has_to_be_the_same_run(options):
    with pytest.raises(UsageError, match="run holds no checkpoint"):
        mnist.train(Config(**options | {"resume": True}))
    mnist.train(Config(**options | {"epochs": 1}))
    with pytest.raises(UsageError, match="batch_size 16, seed 0, and is now given batch_size 8, seed 1"):
        mnist.train(Config(**options | {"epochs": 1, "resume": True, "batch_size": 8, "seed": 1}))
    with pytest.raises(UsageError, match="began with model mlp"):
        mnist.train(Config(**options | {"epochs": 1, "resume": True, "model": "cnn"}))
    with pytest.raises(UsageError, match=r"began with .*data crc32"):
        mnist.train(Config(**options | {"epochs": 1, "resume": True, "train_size": 60}))


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


# The program


def command(*arguments):
    return [sys.executable, str(EXAMPLES / "mnist.py"), *map(str, arguments)]


def run_program(*arguments):
    return subprocess.run(command(*arguments), check=False, capture_output=True, text=True, timeout=120)


def test_the_program_ends_with_its_accuracy_or_one_line(data_dir, tmp_path):
    arguments = ("--model", "mlp", "--max-steps", 3, "--output", tmp_path / "run", "--data-dir")
    good = run_program(*arguments, data_dir)
    assert good.returncode == 0, good.stderr
    assert re.fullmatch(r"test accuracy: [01]\.\d{4}", good.stdout.splitlines()[-1])
    bad = run_program(*arguments, tmp_path / "none")
    assert bad.returncode == 1
    assert bad.stderr == f"error: {tmp_path / 'none'}: no such folder of IDX files (--data-dir)\n"


def stopped(options, by):
    """Exit status and error output of the program, stopped by a signal after its first checkpoint."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    program = subprocess.Popen(command(*flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (options["output"] / "checkpoints" / "5").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        program.send_signal(by)
        _, stderr = program.communicate(timeout=30)
    finally:
        program.kill()
    return program.returncode, stderr


def test_a_killed_run_goes_on_with_nothing_lost(options, tmp_path, monkeypatch):
    """By SIGKILL, which leaves no time for anything, in the middle of whatever it did."""
    monkeypatch.setattr(mnist, "LOG_EVERY", 10)  # as it is in the program
    options = options | {"epochs": 30}
    whole = options | {"output": tmp_path / "whole"}
    accuracy = mnist.train(Config(**whole))
    status, stderr = stopped(options, signal.SIGKILL)
    assert status == -signal.SIGKILL, stderr
    assert saved_state(options)[0] < saved_state(whole)[0]
    assert mnist.train(Config(**options | {"resume": True})) == accuracy
    assert_same_bits(saved_state(options), saved_state(whole))
    assert metrics(options["output"]) == metrics(whole["output"])


def test_ctrl_c_leaves_a_usable_checkpoint(options):
    status, stderr = stopped(options | {"epochs": 100_000}, signal.SIGINT)
    assert status == 130, stderr
    assert re.fullmatch(
        r"stopped at step \d+ of 500000, saved in .*: --resume goes on", stderr.splitlines()[-1]
    )
    assert "Traceback" not in stderr
    step, state = saved_state(options | {"epochs": 100_000})
    assert step >= 5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


# Many devices


def test_8_devices_train_as_one(options):
    """Every way, on batches of 13 rows, which leave one device a single row and another none."""
    one_losses, one_moment = train_10_steps(options, devices=1, parallel="jit")
    for way in ("jit", "shard_map", "pmap"):
        losses, moment = train_10_steps(options, devices=8, parallel=way)
        np.testing.assert_allclose(losses, one_losses, rtol=1e-4, err_msg=way)
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
