"""Batch norm on sequences of different lengths: with a mask it measures them, without one the padding too.

    python examples/masked_sequences.py

A digit of MNIST is read column by column, from the first with ink to the last: 2 to 20 of them. A net of two
convolutions over time says which digit it is. Batches are padded with zeros, either always to 20 columns, or
half of them to 80, as if each were padded to its longest row; the test is always padded to 20. But for batch
norm both nets know what is padding: it is cleared after each layer, and left out of the average over time.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from batches import whole_batches
from errors import one_line_errors
from idx import MNIST, NUM_CLASSES, Split, load_splits
from jbn.linen import BatchNorm
from models import to_unit_range
from parallel import State, initial_state, updated
from progress import ProgressBar

BATCH_SIZE = 128
LONGEST = 20
PADDINGS = {"always to 20": (20,), "to 20 or 80": (20, 80)}
optimizer = optax.adam(0.003)


class Sequences(NamedTuple):
    """`columns` u8[N, T, H], of which the first `lengths` i64[N] are real and the rest 0; `labels` i32[N]."""

    columns: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


class Batch(NamedTuple):
    """`columns` u8[B, T, H]; `mask` bool[B, T], False where a column is padding; `labels` i32[B]."""

    columns: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


class Net(nn.Module):
    """Two convolutions over time, the average over time, and a linear layer.

    Attributes:
      masked: whether batch norm is told what is padding.
    """

    masked: bool

    @nn.compact
    def __call__(self, columns: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        x, real = to_unit_range(columns), mask[..., jnp.newaxis]
        for _ in range(2):
            x = nn.Conv(32, (5,), use_bias=False)(x)
            x = BatchNorm(not train, momentum=0.9)(x, mask=mask if self.masked else None)
            x = jnp.where(real, nn.relu(x), 0.0)
        return nn.Dense(NUM_CLASSES)(x.sum(1) / real.sum(1))


def main(steps: int = 500, seed: int = 0) -> dict[str, list[float]]:
    """Trains both nets with each padding; returns the test accuracies, with the mask and without, of each."""
    train_set, test_set = map(read_columns, load_splits(MNIST))
    rows = whole_batches(seed, len(train_set.labels), BATCH_SIZE, steps)
    found = {padding: [] for padding in PADDINGS}
    for net in (Net(masked=True), Net(masked=False)):
        train_step, count_correct = make_train_step(net), make_count_correct(net)
        for padding, lengths in PADDINGS.items():
            first = padded(train_set, rows[0, :1], LONGEST)
            state = initial_state(net, optimizer, seed, first.columns, first.mask)
            drawn = np.random.default_rng(seed).choice(lengths, steps)
            with ProgressBar(f"padded {padding}", rows.size) as bar:
                for some, length in zip(rows, drawn, strict=True):
                    state = train_step(state, padded(train_set, some, length))
                    bar.update(BATCH_SIZE)
            tests = padded(test_set, np.arange(len(test_set.labels)), LONGEST)
            found[padding].append(int(count_correct(state, tests)) / len(tests.labels))
    print(f"{'padded':14}{'masked':>8}{'not':>8}")
    for padding, accuracies in found.items():
        print(f"{padding:14}" + "".join(f"{accuracy:8.4f}" for accuracy in accuracies))
    (same_masked, same), (masked, unmasked) = found.values()
    print(
        f"Where half of the batches are padded four times as far, the test accuracy is {masked:.4f} with the"
        f" mask and {unmasked:.4f} without; where all are padded alike, {same_masked:.4f} and {same:.4f}."
    )
    return found


def read_columns(split: Split) -> Sequences:
    """Each image as the sequence of its columns, moved so that the first with ink comes first."""
    ink = split.images.any(axis=(1, 3))
    first, last = ink.argmax(1), ink.shape[1] - ink[:, ::-1].argmax(1)
    shifted = np.minimum(first[:, np.newaxis] + np.arange(LONGEST), ink.shape[1] - 1)
    columns = np.take_along_axis(split.images[..., 0], shifted[:, np.newaxis], axis=2).swapaxes(1, 2)
    return Sequences(columns, last - first, split.labels)


def padded(sequences: Sequences, rows: np.ndarray, length: int) -> Batch:
    """Those rows as a batch of `length` columns."""
    columns = np.pad(sequences.columns[rows], ((0, 0), (0, length - LONGEST), (0, 0)))
    return Batch(columns, np.arange(length) < sequences.lengths[rows, np.newaxis], sequences.labels[rows])


def make_train_step(net: Net) -> Callable[[State, Batch], State]:
    def train_step(state: State, batch: Batch) -> State:
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, new = net.apply(variables, batch.columns, batch.mask, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return losses.mean(), new["batch_stats"]

        gradients, batch_stats = jax.grad(loss, has_aux=True)(state.params)
        return updated(optimizer, state, batch_stats, gradients)

    return jax.jit(train_step)


def make_count_correct(net: Net) -> Callable[[State, Batch], jax.Array]:
    def count_correct(state: State, batch: Batch) -> jax.Array:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = net.apply(variables, batch.columns, batch.mask, train=False)
        return jnp.sum(jnp.argmax(logits, axis=-1) == batch.labels)

    return jax.jit(count_correct)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
