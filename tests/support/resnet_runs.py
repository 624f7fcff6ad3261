"""A small folder of pictures, and runs of the ResNet example on it: what its tests share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import resnet.model
import resnet.train
from resnet.options import Config

PER_CLASS, CLASSES, SIZE = 6, ("cat", "cow", "dog", "owl", "pig", "rat"), 16
TRAIN_SIZE, BATCH_SIZE = PER_CLASS * len(CLASSES), 12  # 3 steps an epoch


def write_pictures(folder, seed=0):
    """PNG files in which the column of the class is bright; 20 x 16 pixels."""
    rng = np.random.default_rng(seed)
    for part, per_class in (("train", PER_CLASS), ("val", 3)):
        for label, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for number in range(per_class):
                pixels = rng.integers(0, 60, (16, 20, 3))
                pixels[:, 3 * label + 1] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{number}.png")
    return folder


def first_bytes(count):
    """Pictures and labels that are no folder's."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8)
    return images, rng.integers(0, len(CLASSES), count).astype(np.int32)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data")


@pytest.fixture(autouse=True)
def one_block_for_each_stage(monkeypatch):
    """A ResNet-18 of half its layers compiles in half the time."""
    monkeypatch.setitem(resnet.model.STAGES, 18, (1, 1, 1, 1))


@pytest.fixture
def options(data_dir, tmp_path, monkeypatch, flax_promotion):
    """Options of a run of 2 epochs, 6 steps, whose metrics have a row for every step."""
    monkeypatch.setattr(resnet.log, "draw_curves", lambda metrics, picture: None)  # takes a second
    return {
        "data_dir": data_dir,
        "output": tmp_path / "run",
        "depth": 18,
        "width": 4,
        "dtype": "float32",
        "epochs": 2,
        "batch_size": BATCH_SIZE,
        "warmup_epochs": 0.5,
        "image_size": SIZE,
        "crop_scale": 0.5,
        "threads": 2,
        "log_every": 1,
        "devices": 1,
    }


def new_run(options, **changes):
    """A run, which has not begun."""
    return resnet.train.Run(Config(**options | changes))


def model_file(options):
    return Path(options["output"]) / "model.safetensors"
