"""A folder of class folders of pictures, as ImageNet lies on disks, in batches: read by Grain and Pillow.

The pipeline for training is a list that can be indexed: the pictures, shuffled anew for each epoch, without
end; a random crop of each; every process's rows; batches. So what a batch holds depends on its number and on
the seed, not on how many processes, workers or threads read it, and an iterator is resumed by its state.
"""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Literal

import grain
import numpy as np
from absl import flags
from PIL import Image

from batches import Batch, num_batches
from errors import UsageError

SUFFIXES = {".jpg", ".jpeg", ".png"}
_RATIOS = (3 / 4, 4 / 3)  # of a crop's sides; these and the number of tries are those of torchvision
_TRIES = 10


class Pictures:
    """The pictures of a folder with one folder per class, as a sequence of (RGB picture, label).

    Attributes:
      classes: names of the class folders, in alphabetical order: a label is a place in this list.
      names: of the files, each with its folder, in order.
      empty: names of the class folders without a picture.
    """

    def __init__(self, folder: Path, *, broken: Literal["skip", "stop"] = "skip") -> None:
        self._folder, self._broken = folder, broken
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder of class folders (--data-dir)")
        self.classes = class_names(folder)
        self.names, self._labels, self.empty = [], [], []
        for label, name in enumerate(self.classes):
            files = sorted(path.name for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES)
            self.names += [f"{name}/{file}" for file in files]
            self._labels += [label] * len(files)
            self.empty += [] if files else [name]
        if not self.names:
            raise UsageError(f"{folder}: holds no class folders with JPEG or PNG files")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The picture, or the next one that can be decoded, so that batches stay full."""
        for other in range(len(self)):
            found = self.decode((index + other) % len(self))
            if found is not None:
                return found
        raise UsageError(f"{self._folder}: none of its {len(self)} pictures can be decoded")

    def decode(self, index: int) -> tuple[Image.Image, int] | None:
        """One picture; None, and a line on stderr, if it is broken and may be skipped."""
        path = self._folder / self.names[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB"), self._labels[index]
        except Exception as error:  # Pillow has a class for each way to be broken
            if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the picture's
                raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
            problem = f"{path}: cannot be decoded: {error}"
        if self._broken == "stop":
            raise UsageError(f"{problem} (--broken skip goes on without it)")
        print(f"warning: {problem}: skipped", file=sys.stderr)
        return None


def class_names(folder: Path) -> list[str]:
    """The folders in it, without hidden ones, such as those that Jupyter leaves."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


class RandomCrop:
    """A random part of a picture, resized to a square, half of the time mirrored (Szegedy et al. 2014)."""

    def __init__(self, size: int, *, smallest: float, flip: bool) -> None:
        """`smallest`: the least part of the picture's area that a crop has."""
        self._size, self._smallest, self._flip = size, smallest, flip

    def __call__(self, example: tuple[Image.Image, int], rng: np.random.Generator) -> Batch:
        image, label = example
        image = image.resize((self._size, self._size), Image.Resampling.BILINEAR, box=self._box(image, rng))
        if self._flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _row(image, label)

    def _box(self, image: Image.Image, rng: np.random.Generator) -> tuple[float, float, float, float]:
        width, height = image.size
        for _ in range(_TRIES):
            area = width * height * rng.uniform(self._smallest, 1.0)
            ratio = np.exp(rng.uniform(*np.log(_RATIOS)))
            crop_width, crop_height = np.sqrt(area * ratio), np.sqrt(area / ratio)
            if crop_width <= width and crop_height <= height:
                left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
                return left, top, left + crop_width, top + crop_height
        return center_box(image, 1.0)


class CenterCrops:
    """The pictures in their order for evaluation, by index; beyond the last one, rows that are masked."""

    def __init__(self, pictures: Pictures, size: int, *, part: float) -> None:
        """`part`: of the shorter side."""
        self._pictures, self._size, self._part = pictures, size, part

    def __call__(self, index: int) -> Batch:
        found = self._pictures.decode(index) if index < len(self._pictures) else None
        if found is None:
            return Batch(np.zeros((self._size, self._size, 3), np.uint8), np.int32(0), np.False_)
        image, label = found
        return _row(center_crop(image, self._size, self._part), label)


def center_crop(image: Image.Image, size: int, part: float) -> Image.Image:
    """The square in the middle, `part` of the shorter side, resized."""
    return image.resize((size, size), Image.Resampling.BILINEAR, box=center_box(image, part))


def center_box(image: Image.Image, part: float) -> tuple[float, float, float, float]:
    width, height = image.size
    side = part * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _row(image: Image.Image, label: int) -> Batch:
    return Batch(np.asarray(image), np.int32(label), np.True_)


def training_batches(
    pictures: Pictures,
    crop: RandomCrop,
    size: int,
    *,
    seed: int,
    part: int = 0,
    num_parts: int = 1,
    workers: int = 0,
    threads: int = 1,
) -> grain.DatasetIterator:
    """Batches without end; of `size` rows in all, those of part number `part` of `num_parts` equal ones."""
    examples = grain.MapDataset.source(pictures).seed(seed).shuffle().repeat().random_map(crop)
    batches = examples[part::num_parts].batch(size // num_parts)
    return _iterate(batches, workers, threads)


def evaluation_batches(
    crops: CenterCrops,
    count: int,
    size: int,
    *,
    part: int = 0,
    num_parts: int = 1,
    workers: int = 0,
    threads: int = 1,
) -> grain.DatasetIterator:
    """Batches of `count` pictures in their order, the last one filled up with masked rows. Parts as above."""
    rows = grain.MapDataset.range(num_batches(count, size) * size).map(crops)
    return _iterate(rows[part::num_parts].batch(size // num_parts), workers, threads)


def _iterate(batches: grain.MapDataset, workers: int, threads: int) -> grain.DatasetIterator:
    flags.FLAGS.mark_as_parsed()  # Grain's workers read some, and the command line here is Tyro's
    grain.config.update("py_traceback_filtering", "off")  # it adds a paragraph to the texts of errors
    # An element is a batch, 300 MB for 2,048 pictures of ImageNet: each worker is one thread, and has few.
    threads, buffered = (1, 1) if workers else (threads, 2 * threads)
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffered)
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return iter(batches.to_iter_dataset(reading).mp_prefetch(processes, _live_as_long_as_the_run))


def _live_as_long_as_the_run(*_: int) -> None:
    """Ctrl-C reaches every process of a terminal, SIGTERM all of a cluster's job: the run ends its own.

    One that is killed cannot, and its workers would wait for it forever.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)
