"""The data files of the MNIST example, and the batches that it takes from them."""

import gzip
import hashlib
from pathlib import Path

import jax
import numpy as np
import pytest

import batches
import idx
import models
import parallel
from errors import UsageError
from tests.support import mnist_runs
from tests.support.mnist_runs import (
    BATCH_SIZE,
    EXAMPLES,
    TEST_SIZE,
    TRAIN_SIZE,
    assert_same_bits,
    idx_bytes,
    write_data,
)

# pytest finds a fixture by its name in the file of the test.
data_dir = mnist_runs.data_dir


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


@pytest.mark.training
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
