"""A small set in MNIST's form, and runs on it: what the tests of the example share."""

import csv
import gzip
from pathlib import Path

import jax
import numpy as np
import pytest

import mnist
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
def compile_once(tmp_path_factory):
    """Runs of the same program compile it once, also in another file: JAX stays with its first folder."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
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
