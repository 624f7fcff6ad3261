"""Trains with batches of 512 that go through the net as 8 micro-batches of 64, for when 512 do not fit.

    python examples/gradient_accumulation.py

Optax averages the gradients and steps once in 8 calls. Each batch norm merges the moments of the rows that it
sees, and its running statistics are updated once as well: by all 512 rows, as if they had come in one batch.
In training each micro-batch is still normalized by its own 64 rows, so gradients are those of batches of 64.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jbn
import jbn.tools
from batches import whole_batches
from errors import one_line_errors
from idx import MNIST, NUM_CLASSES, load_splits
from jbn.linen import BatchNorm
from models import to_unit_range
from progress import ProgressBar

BATCH_SIZE, PARTS, MOMENTUM = 512, 8, 0.9
optimizer = optax.MultiSteps(optax.adam(0.003), every_k_schedule=PARTS)


class Net(nn.Module):
    """784 pixels, batch norm on them too, two hidden layers."""

    @nn.compact
    def __call__(self, images, *, train):
        x = to_unit_range(images).reshape(len(images), -1)
        x = BatchNorm(not train, momentum=MOMENTUM, name="pixels")(x)
        for features in (128, 128):
            x = nn.Dense(features, use_bias=False)(x)
            x = nn.relu(BatchNorm(not train, momentum=MOMENTUM)(x))
        return nn.Dense(NUM_CLASSES)(x)


@jax.jit
def accumulate(variables, moments, opt_state, images, labels):
    """Takes in one micro-batch: keeps its gradients and moments. After the last of PARTS Optax steps."""

    def loss(params):
        collections = {**variables, **moments, "params": params}
        logits, new = Net().apply(collections, images, train=True, mutable=["batch_stats", "batch_moments"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), {"batch_moments": new["batch_moments"]}  # not the statistics after one part

    gradients, moments = jax.grad(loss, has_aux=True)(variables["params"])
    updates, opt_state = optimizer.update(gradients, opt_state)
    params = optax.apply_updates(variables["params"], updates)  # by 0, until the last part
    return {**variables, "params": params}, moments, opt_state


@jax.jit
def update_statistics(variables, moments):
    """One update of the running statistics, by the rows of all parts."""
    return jbn.tools.apply_moments(variables, moments, momentum=MOMENTUM)


def main(steps: int = 200, seed: int = 0) -> tuple[float, float]:
    """Trains; returns the test accuracy, and how far the statistics are from those of whole batches."""
    train_set, test_set = load_splits(MNIST)
    variables = Net().init(jax.random.key(seed), train_set.images[:1], train=False)
    opt_state, expected = optimizer.init(variables["params"]), variables["batch_stats"]["pixels"]
    with ProgressBar("gradient_accumulation", steps * BATCH_SIZE) as bar:
        for rows in whole_batches(seed, len(train_set.labels), BATCH_SIZE, steps):
            moments = {}
            for part in np.split(rows, PARTS):
                batch = train_set.images[part], train_set.labels[part]
                variables, moments, opt_state = accumulate(variables, moments, opt_state, *batch)
            variables = update_statistics(variables, moments)
            whole = jbn.moments(to_unit_range(train_set.images[rows]).reshape(BATCH_SIZE, -1))
            expected = jbn.update(expected, whole, momentum=MOMENTUM)
            bar.update(BATCH_SIZE)
    found = variables["batch_stats"]["pixels"]
    apart = max(float(jnp.abs(found[name] - expected[name]).max()) for name in expected)
    logits = Net().apply(variables, test_set.images, train=False)
    result = float(jnp.mean(jnp.argmax(logits, axis=-1) == test_set.labels))
    print(
        f"After {steps:,} updates, each from {PARTS} micro-batches of {BATCH_SIZE // PARTS}, the test"
        f" accuracy is {result:.4f}, and the running statistics of the pixels are those of whole batches of"
        f" {BATCH_SIZE}, to {apart:.0e}."
    )
    return result, apart


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
