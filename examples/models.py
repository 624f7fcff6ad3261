"""Small nets with batch norm between each linear layer and its relu or sigmoid, for images of 10 classes.

Linear layers before a batch norm have no bias: the mean that is subtracted would take it away again.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

import jbn.linen
from idx import NUM_CLASSES


class Cnn(nn.Module):
    """Three convolutions that halve the image each (no pooling, whose gradient is slow on a CPU), two Dense.

    Attributes:
      momentum: of the running statistics; weighs the old ones.
      axis_name: the mapped axis over which the batch is cut, under shard_map and pmap.
    """

    momentum: float = 0.9
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        x = to_unit_range(images)
        for features, window in ((24, 5), (48, 3), (96, 3)):
            x = nn.Conv(features, (window, window), strides=2, use_bias=False)(x)
            x = jbn.linen.BatchNorm(not train, momentum=self.momentum, axis_name=self.axis_name)(x, mask=mask)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.Dense(128, use_bias=False)(x)
        x = jbn.linen.BatchNorm(not train, momentum=self.momentum, axis_name=self.axis_name)(x, mask=mask)
        return nn.Dense(NUM_CLASSES)(nn.relu(x))


class Mlp(nn.Module):
    """Two hidden layers on the bare pixels (784 in MNIST). Attributes as in `Cnn`."""

    momentum: float = 0.9
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        x = to_unit_range(images).reshape(images.shape[0], -1)
        for features in (128, 128):
            x = nn.Dense(features, use_bias=False)(x)
            x = jbn.linen.BatchNorm(not train, momentum=self.momentum, axis_name=self.axis_name)(x, mask=mask)
            x = nn.relu(x)
        return nn.Dense(NUM_CLASSES)(x)


class Plain(nn.Module):
    """Hidden layers on the bare pixels, with batch norm or without: what the experiments compare.

    Without batch norm, initialization decides how fast a net trains, so the weights are those that He et al.
    2015 (arXiv 1502.01852) derive for relus, and the input is standardized.

    Attributes:
      layers: how many hidden layers.
      features: of each of them.
      batch_norm: whether there is any. Without it a linear layer has a bias.
      dropout: the share of the features of each hidden layer that training sets to 0.
      momentum: as in `Cnn`.
    """

    layers: int
    features: int
    batch_norm: bool
    dropout: float = 0.0
    momentum: float = 0.9

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = standardized(images).reshape(images.shape[0], -1)
        for _ in range(self.layers):
            he = nn.initializers.he_normal()
            x = nn.Dense(self.features, use_bias=not self.batch_norm, kernel_init=he)(x)
            if self.batch_norm:
                x = jbn.linen.BatchNorm(not train, momentum=self.momentum)(x)
            x = nn.relu(x)
            x = nn.Dropout(self.dropout, deterministic=not train, rng_collection="noise")(x)
        return nn.Dense(NUM_CLASSES)(x)


class Sigmoids(nn.Module):
    """Three layers of 100 sigmoids on binary images: the net of Figure 1 of arXiv 1502.03167.

    In the collection "intermediates" it leaves the `input` f32[batch, 100] of each layer of sigmoids.

    Attributes:
      batch_norm: whether it stands before each sigmoid. It has the bias then.
      spread: the standard deviation of the initial weights.
      disturb: makes of a key and the input of a layer of sigmoids what they get in its place, in training.
    """

    batch_norm: bool
    spread: float
    disturb: Callable[[jax.Array, jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        small = nn.initializers.normal(self.spread)
        y = jnp.where(images.reshape(images.shape[0], -1) > 127, 1.0, 0.0)
        for _ in range(3):
            x = nn.Dense(100, use_bias=not self.batch_norm, kernel_init=small)(y)
            if self.batch_norm:
                x = jbn.linen.BatchNorm(not train, momentum=0.9)(x)
            if self.disturb is not None and train:
                x = self.disturb(self.make_rng("noise"), x)
            self.sow("intermediates", "input", x)
            y = nn.sigmoid(x)
        return nn.Dense(NUM_CLASSES, kernel_init=small)(y)


def to_unit_range(images: jax.Array) -> jax.Array:
    """Bytes to [0, 1], on the device: a quarter of the bytes travel. The first batch norm does the rest."""
    return images.astype(jnp.float32) / 255.0


def standardized(images: jax.Array) -> jax.Array:
    """Bytes to mean 0 and variance 1 over all pixels of MNIST."""
    return (to_unit_range(images) - 0.13) / 0.31
