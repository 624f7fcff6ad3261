"""The convolutional net of mnist.py in Flax NNX: `jbn.nnx.BatchNorm` keeps its own statistics.

    python examples/mnist_nnx.py

The layers and their settings are those of `models.Cnn`. What differs is where the running statistics are: in
variables of the model, which a call in training mode updates and `nnx.jit` carries in and out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import jbn.nnx
from batches import whole_batches
from errors import one_line_errors
from idx import MNIST, NUM_CLASSES, load_splits
from models import to_unit_range
from progress import ProgressBar

BATCH_SIZE, TEST_BATCH = 128, 1000
CONVOLUTIONS = ((24, 5), (48, 3), (96, 3))  # features, and the window's side


class Cnn(nnx.Module):
    """Three convolutions that halve the image each, and two linear layers."""

    def __init__(self, side: int, *, rngs: nnx.Rngs) -> None:
        """For images of `side` times `side` pixels."""
        self.convolutions, self.norms = nnx.List(), nnx.List()
        channels = 1
        for features, window in CONVOLUTIONS:
            shape = (window, window)
            self.convolutions.append(
                nnx.Conv(channels, features, shape, strides=2, use_bias=False, rngs=rngs)
            )
            self.norms.append(jbn.nnx.BatchNorm(features, momentum=0.9, rngs=rngs))
            channels, side = features, -(-side // 2)
        self.hidden = nnx.Linear(side * side * channels, 128, use_bias=False, rngs=rngs)
        self.hidden_norm = jbn.nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.logits = nnx.Linear(128, NUM_CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = to_unit_range(images)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x)))
        x = self.hidden(x.reshape(len(x), -1))
        return self.logits(nnx.relu(self.hidden_norm(x)))


@nnx.jit
def train_step(model: Cnn, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> None:
    def loss(model: Cnn) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def count_correct(model: Cnn, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum(jnp.argmax(model(images), axis=-1) == labels)


def main(steps: int = 936, seed: int = 0) -> float:  # two epochs
    """Trains, and says and returns the test accuracy."""
    train_set, test_set = load_splits(MNIST)
    rows = whole_batches(seed, len(train_set.labels), BATCH_SIZE, steps)
    model = Cnn(train_set.images.shape[1], rngs=nnx.Rngs(seed))
    schedule = optax.cosine_onecycle_schedule(steps, 0.004, pct_start=0.2)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
    with ProgressBar("mnist_nnx", rows.size) as bar:
        for some in rows:
            train_step(model, optimizer, train_set.images[some], train_set.labels[some])
            bar.update(BATCH_SIZE)
    model.eval()  # batch norms now use their running statistics
    count, correct = len(test_set.labels), 0
    for some in np.split(np.arange(count), range(TEST_BATCH, count, TEST_BATCH)):
        correct += int(count_correct(model, test_set.images[some], test_set.labels[some]))
    result = correct / count
    print(f"With jbn.nnx.BatchNorm the test accuracy is {result:.4f} after {steps:,} steps.")
    return result


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
