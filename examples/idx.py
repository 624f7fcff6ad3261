"""Reads image classification data from IDX files, the format of MNIST and of the sets that follow it.

An IDX file is a big-endian header and then the values, row by row:

    0, 0, type of the values (8: unsigned byte), number of axes: 1 byte each; each axis: 4 bytes each

Reference: http://yann.lecun.com/exdb/mnist, "The IDX file format".
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import UsageError

NUM_CLASSES = 10
MNIST = Path(__file__).parent / "data" / "mnist"
_UNSIGNED_BYTE = 8
_GZIP_MAGIC = b"\x1f\x8b"


class Split(NamedTuple):
    """Images and their labels: `images` u8[N, H, W, 1], `labels` i32[N]."""

    images: np.ndarray
    labels: np.ndarray


def load_splits(folder: Path) -> tuple[Split, Split]:
    """Reads the training and the test set of a folder with MNIST's four file names.

    Raises:
      UsageError: a file is absent, unreadable, truncated, or does not fit the others. The text names it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of IDX files (--data-dir)")
    train = _load_split(folder, "train")
    test = _load_split(folder, "t10k")
    if train.images.shape[1:] != test.images.shape[1:]:
        path = _find(folder, "t10k-images-idx3-ubyte")
        raise UsageError(
            f"{path}: holds images of {_size(test.images)} pixels, but the training images have"
            f" {_size(train.images)}"
        )
    return train, test


def read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """Reads unsigned bytes of `ndim` axes; whether the file is gzipped its first bytes tell, not its name."""
    content = _read_bytes(path)
    header_size = 4 + 4 * ndim
    magic = bytes([0, 0, _UNSIGNED_BYTE, ndim])
    if content[:4] != magic:
        raise UsageError(
            f"{path}: starts with bytes {content[:4].hex(' ') or '(none)'}, expected {magic.hex(' ')}:"
            f" not an IDX file of unsigned bytes with {ndim} axes"
        )
    if len(content) < header_size:
        raise UsageError(f"{path}: truncated, its header has {len(content)} bytes of {header_size}")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", count=ndim, offset=4))
    found, expected = len(content) - header_size, math.prod(shape)
    if found != expected:
        problem = "truncated" if found < expected else "too long"
        raise UsageError(f"{path}: {problem}, {found} bytes of data for shape {shape}, expected {expected}")
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


def _load_split(folder: Path, prefix: str) -> Split:
    images_path = _find(folder, f"{prefix}-images-idx3-ubyte")
    labels_path = _find(folder, f"{prefix}-labels-idx1-ubyte")
    images = read_idx(images_path, ndim=3)
    labels = read_idx(labels_path, ndim=1)
    if images.size == 0:
        raise UsageError(f"{images_path}: holds no pixels, its shape is {images.shape}")
    if len(images) != len(labels):
        raise UsageError(f"{labels_path}: holds {len(labels)} labels for the {len(images)} images beside it")
    if labels.max() >= NUM_CLASSES:
        raise UsageError(f"{labels_path}: holds label {labels.max()}, expected 0 to {NUM_CLASSES - 1}")
    return Split(images[..., np.newaxis], labels.astype(np.int32))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise UsageError(f"{folder / name}: no such file, nor {name}.gz")


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP_MAGIC) else content
    except EOFError:
        raise UsageError(f"{path}: truncated, its gzip stream ends early") from None
    except (OSError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise UsageError(f"{path}: cannot be read: {error}") from None


def _size(images: np.ndarray) -> str:
    return "x".join(str(n) for n in images.shape[1:3])
