"""Cuts a data set into batches of one fixed size, shuffled: padded and masked, or whole ones alone.

The order is a function of (seed, epoch) alone. A run is therefore resumed at any step by counting, with no
generator state to keep, and several hosts agree on it without talking.
"""

from typing import NamedTuple

import numpy as np

from errors import UsageError
from idx import Split


class Batch(NamedTuple):
    """`images` u8[B, H, W, 1], `labels` i32[B], and `mask` bool[B], False where a row is padding."""

    images: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order, i64[count], in which an epoch goes through the data."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def num_batches(count: int, batch_size: int) -> int:
    """Batches in an epoch, the last one perhaps padded."""
    return -(-count // batch_size)


def take(split: Split, rows: np.ndarray, size: int, *, part: int = 0, num_parts: int = 1) -> Batch:
    """Gathers `rows` of the data, padded to `size`; of that, part number `part` of `num_parts` equal ones.

    Padding repeats image 0: what it holds is of no matter, because the mask keeps it out of the statistics
    and of the loss.
    """
    mask = np.arange(size) < len(rows)
    rows = np.pad(rows, (0, size - len(rows)))
    share = size // num_parts
    mine = slice(part * share, (part + 1) * share)
    return Batch(split.images[rows[mine]], split.labels[rows[mine]], mask[mine])


def check_seeds(seeds: int) -> None:
    """Raises UsageError for fewer than one."""
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: expected 1 or more")


def whole_batches(seed: int, count: int, size: int, steps: int) -> np.ndarray:
    """The rows of each step, i64[steps, size], epoch after epoch, without what is left over at an end.

    Raises:
      UsageError: fewer than one step, or a seed below 0.
    """
    if steps < 1:
        raise UsageError(f"--steps {steps}: expected 1 or more")
    if seed < 0:
        raise UsageError(f"--seed {seed}: expected 0 or more")
    per_epoch = count // size
    epochs = [epoch_order(seed, epoch, count)[: per_epoch * size] for epoch in range(-(-steps // per_epoch))]
    return np.concatenate(epochs).reshape(-1, size)[:steps]
