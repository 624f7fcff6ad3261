"""Sequences of different lengths, padded to one, and a convolutional net that is told what is padding.

Reference: Wang, Yan and Oates 2017, arXiv 1611.06455, the fully convolutional net.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from batches import whole_batches
from jbn.linen import BatchNorm
from parallel import State, initial_state
from progress import ProgressBar
from training import make_accuracy, make_train_step

KINDS = {"with": True, "without": False}


class Sequences(NamedTuple):
    """`values` [N, T, ...], 0 where `mask` bool[N, T] is False; `labels` i32[N]."""

    values: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


def padded(values: Sequence[np.ndarray], labels: Sequence[int], length: int) -> Sequences:
    """Sequences of their own lengths, all padded to `length`."""
    found = np.zeros((len(values), length, *values[0].shape[1:]), values[0].dtype)
    for row, one in zip(found, values, strict=True):
        row[: len(one)] = one
    mask = np.arange(length) < np.array([len(one) for one in values])[:, np.newaxis]
    return Sequences(found, mask, np.array(labels, np.int32))


class Fcn(nn.Module):
    """Convolutions over time with batch norm and relu, and the average over time.

    Attributes:
      classes: how many.
      batch_norm: whether there is any. Without it a convolution has a bias.
      features: of each convolution.
    """

    classes: int
    batch_norm: bool
    features: tuple[int, int, int] = (128, 256, 128)

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        real = mask[..., jnp.newaxis]
        for features, window in zip(self.features, (8, 5, 3), strict=True):
            x = nn.Conv(features, (window,), use_bias=not self.batch_norm)(x)
            if self.batch_norm:
                x = BatchNorm(not train, momentum=0.9)(x, mask=mask)
            x = jnp.where(real, nn.relu(x), 0.0)
        return nn.Dense(self.classes)(x.sum(1) / real.sum(1))


def make_fit(
    net: nn.Module, data: Sequences, batch_size: int, steps: int, rate: float
) -> Callable[[int, ProgressBar], State]:
    """A function that trains a new net with a seed, by Adam from `rate` down to 0."""

    def make_optimizer(rate: jax.Array) -> optax.GradientTransformation:
        return optax.adam(optax.linear_schedule(rate, 0.0, steps))

    train_step = jax.jit(make_train_step(net, make_optimizer), donate_argnums=0)

    def fit(seed: int, bar: ProgressBar) -> State:
        state = initial_state(net, make_optimizer(rate), seed, data.values[:1], data.mask[:1])
        for rows in whole_batches(seed, len(data.labels), batch_size, steps):
            state = train_step(state, data[:2], data.labels, rows, rate, jax.random.key(seed))
            bar.update(batch_size)
        return state

    return fit


def accuracies(
    make_net: Callable[[bool], nn.Module],
    train_set: Sequences,
    test_set: Sequences,
    batch_size: int,
    rates: Mapping[str, float],
    steps: int,
    seeds: int,
) -> dict[str, list[float]]:
    """The test accuracies of nets with and without batch norm, one for each seed; each kind has its rate."""
    train_set, test_set = jax.device_put((train_set, test_set))
    found = {}
    for kind, batch_norm in KINDS.items():
        net = make_net(batch_norm)
        fit = make_fit(net, train_set, batch_size, steps, rates[kind])
        accuracy = jax.jit(make_accuracy(net))
        with ProgressBar(kind, seeds * steps * batch_size) as bar:
            ends = [fit(seed, bar) for seed in range(seeds)]
        found[kind] = [float(accuracy(end, test_set[:2], test_set.labels)) for end in ends]
    return found
