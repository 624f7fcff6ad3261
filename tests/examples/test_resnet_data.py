"""The pictures of the ResNet example: the same batches however they are read, and none twice."""

import errno
import multiprocessing
import os
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("grain")
pytest.importorskip("safetensors")

import resnet.throughput
import resnet.train
from errors import UsageError
from resnet.data import CenterCrops, Pictures, RandomCrop, center_crop, evaluation_batches, training_batches
from resnet.options import Config
from resnet.predict import read
from tests.support import resnet_runs
from tests.support.processes import ended, started
from tests.support.resnet_runs import BATCH_SIZE, CLASSES, SIZE, TRAIN_SIZE

data_dir = resnet_runs.data_dir
STEPS = TRAIN_SIZE // BATCH_SIZE


@pytest.fixture
def pictures(data_dir):
    return Pictures(data_dir / "train")


def reader(pictures, **options):
    crop = RandomCrop(SIZE, smallest=0.5, flip=True)
    return training_batches(pictures, crop, BATCH_SIZE, seed=0, **options)


def take(iterator, count):
    """The next batches, joined, as arrays of our own memory."""
    batches = [next(iterator) for _ in range(count)]
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def test_batches_do_not_depend_on_what_reads_them(pictures):
    expected = take(reader(pictures), 5)
    assert_same(take(reader(pictures, threads=3), 5), expected)
    halves = [take(reader(pictures, part=part, num_parts=2), 5) for part in (0, 1)]
    for whole, parts in zip(expected, zip(*halves, strict=True), strict=True):
        joined = np.empty_like(whole)
        joined[0::2], joined[1::2] = parts
        np.testing.assert_array_equal(joined, whole)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_other_processes_read_the_same_and_go_on_where_they_were(pictures):
    iterator = reader(pictures, workers=2)
    begun = take(iterator, 3)
    state = iterator.get_state()
    iterator.close()
    later = reader(pictures, workers=2)
    later.set_state(state)
    rest = take(later, 2)
    # Ctrl-C in a terminal reaches them too, and is left to the run, which saves and closes the iterator.
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    rest = [np.concatenate(parts) for parts in zip(rest, take(later, 19), strict=True)]
    later.close()
    found = [np.concatenate(parts) for parts in zip(begun, rest, strict=True)]
    assert_same(found, take(reader(pictures), 24))


def test_workers_end_with_a_run_that_is_killed(data_dir):
    """They ignore the signals that would else end them. All of them hold the program's stdout."""
    reading = f"""
import signal, sys
sys.path.insert(0, {str(Path(resnet.train.__file__).parents[1])!r})
from pathlib import Path
from resnet.data import Pictures, RandomCrop, training_batches

if __name__ == "__main__":
    crop = RandomCrop({SIZE}, smallest=0.5, flip=True)
    batches = training_batches(Pictures(Path({str(data_dir / "train")!r})), crop, 4, seed=0, workers=2)
    next(batches)
    print("reading", flush=True)
    signal.pause()
"""
    with started([["-c", reading]]) as (program,):
        assert "reading\n" in iter(program.stdout.readline, "")  # after what Grain may warn of
        program.kill()
        ended([program])


def test_an_iterator_goes_on_from_its_state(pictures):
    iterator, later = reader(pictures, threads=2), reader(pictures, threads=2)
    take(iterator, 4)
    later.set_state(iterator.get_state())
    assert_same(take(later, 4), take(iterator, 4))


def test_an_epoch_has_each_picture_once_in_an_order_of_its_own(pictures):
    whole = RandomCrop(SIZE, smallest=1.0, flip=False)
    iterator = training_batches(pictures, whole, BATCH_SIZE, seed=0)
    epochs = [take(iterator, STEPS) for _ in range(2)]
    for _, labels, mask in epochs:
        np.testing.assert_array_equal(np.bincount(labels), [TRAIN_SIZE // len(CLASSES)] * len(CLASSES))
        assert mask.all()
    assert (epochs[0][1] != epochs[1][1]).any()


def test_evaluation_has_each_picture_once_and_masks_the_rest(data_dir):
    pictures = Pictures(data_dir / "val")
    crops = CenterCrops(pictures, SIZE, part=1.0)
    parts = [list(evaluation_batches(crops, len(pictures), 8, part=p, num_parts=2)) for p in (0, 1)]
    assert [len(batches) for batches in parts] == [3, 3]  # 18 pictures in batches of 2 x 4
    images, labels, mask = take(evaluation_batches(crops, len(pictures), 8), 3)
    np.testing.assert_array_equal(mask, np.arange(24) < 18)
    np.testing.assert_array_equal(labels[mask], np.repeat(np.arange(len(CLASSES)), 3))
    for name, image in zip(pictures.names, images, strict=False):
        np.testing.assert_array_equal(image, read(data_dir / "val" / name, SIZE, 1.0))


def test_a_crop_lies_in_the_picture_and_has_the_area_that_is_asked_for():
    image, rng = Image.new("RGB", (30, 20)), np.random.default_rng(0)
    boxes = np.array([RandomCrop(8, smallest=0.3, flip=False)._box(image, rng) for _ in range(200)])
    left, top, right, bottom = boxes.T
    assert min(left.min(), top.min()) >= 0
    assert right.max() <= 30
    assert bottom.max() <= 20
    areas = (right - left) * (bottom - top) / 600
    assert areas.min() > 0.3 - 1e-9
    assert np.ptp(areas) > 0.3
    assert np.ptp((right - left) / (bottom - top)) > 0.3


def test_the_center_is_a_square_in_the_middle():
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[5:15, 10:20] = 200
    crop = np.asarray(center_crop(Image.fromarray(pixels), 10, 0.5))
    np.testing.assert_array_equal(crop, np.full((10, 10, 3), 200))


@pytest.fixture
def with_broken(data_dir, tmp_path):
    """A folder in which the second picture is cut short and the third is no picture."""
    folder = tmp_path / "broken"
    shutil.copytree(data_dir / "train", folder)
    whole = (folder / "cat" / "1.png").read_bytes()
    (folder / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "2.png").write_text("no picture")
    return folder


def test_a_broken_picture_is_named_and_the_next_one_takes_its_place(with_broken, capfd):
    pictures = Pictures(with_broken)
    expected = np.asarray(pictures[3][0])
    capfd.readouterr()
    np.testing.assert_array_equal(np.asarray(pictures[1][0]), expected)
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith(f"warning: {with_broken / 'cat' / '1.png'}: cannot be decoded: ")
    assert second.startswith(f"warning: {with_broken / 'cat' / '2.png'}: cannot be decoded: ")
    assert second.endswith(": skipped")
    rows = next(evaluation_batches(CenterCrops(pictures, SIZE, part=1.0), len(pictures), 6))
    np.testing.assert_array_equal(rows.mask, [True, False, False, True, True, True])


def test_a_broken_picture_stops_the_run_if_that_is_asked_for(with_broken):
    with pytest.raises(
        UsageError, match=r"cat/\d\.png: cannot be decoded: .* \(--broken skip goes on without it\)$"
    ):
        take(reader(Pictures(with_broken, broken="stop"), threads=2), STEPS)


def test_a_file_that_cannot_be_read_is_no_broken_picture(pictures, monkeypatch):
    """A disk that is gone would else skip every picture."""

    def gone(path):
        raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr(Image, "open", gone)
    with pytest.raises(UsageError, match=r"cat/0\.png: cannot be read: Input/output error$"):
        pictures.decode(0)


def test_a_folder_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(UsageError, match="none: no such folder of class folders"):
        Pictures(tmp_path / "none")
    (tmp_path / "cat").mkdir()
    with pytest.raises(UsageError, match="holds no class folders with JPEG or PNG files"):
        Pictures(tmp_path)
    (tmp_path / "cat" / "1.png").write_text("no picture")
    (tmp_path / "dog").mkdir()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert (Pictures(tmp_path).classes, Pictures(tmp_path).empty) == (["cat", "dog"], ["dog"])
    for part in ("train", "val"):
        shutil.copytree(tmp_path / "cat", tmp_path / "data" / part / "cat")
        (tmp_path / "data" / part / "dog").mkdir()
    with pytest.raises(UsageError, match=r"data/train/dog: holds no JPEG or PNG files"):
        resnet.train.Run(Config(data_dir=tmp_path / "data", devices=1))
    with pytest.raises(UsageError, match="none of its 1 pictures can be decoded"):
        Pictures(tmp_path)[0]


def test_throughput_counts_no_batch_that_was_there_before(monkeypatch):
    """The clock is the number of calls."""
    calls, readings = [], []

    def reading():
        readings.append(len(calls))
        return readings[-1]

    monkeypatch.setattr(resnet.throughput, "time", types.SimpleNamespace(perf_counter=reading))
    run = types.SimpleNamespace(config=Config(data_dir=Path(), workers=3), state=())
    assert resnet.throughput.seconds(run, lambda: calls.append(0)) == resnet.throughput.STEPS
    assert readings[0] >= 3 * run.config.workers
