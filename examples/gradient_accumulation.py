"""Trains with batches of 512 that go through the net as 8 micro-batches of 64, for when 512 do not fit.

    python examples/gradient_accumulation.py
    python examples/gradient_accumulation.py --steps 20

Optax averages the gradients and steps once in 8 calls. Each batch norm merges the moments of the rows that it
sees, and its running statistics are updated once as well: by all 512 rows, as if they had come in one batch.
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import batches
import jbn.linen
import jbn.tools
from errors import one_line_errors
from idx import NUM_CLASSES, load_splits
from models import to_unit_range

BATCH, PARTS = 512, 8
MOMENTUM = 0.9
OPTIMIZER = optax.MultiSteps(optax.adam(3e-3), every_k_schedule=PARTS)


class Net(nn.Module):
    """784 pixels, batch norm on them too, two hidden layers."""

    @nn.compact
    def __call__(self, images, *, train):
        x = to_unit_range(images).reshape(images.shape[0], -1)
        x = jbn.linen.BatchNorm(not train, momentum=MOMENTUM, name="pixels")(x)
        for features in (128, 128):
            x = nn.Dense(features, use_bias=False)(x)
            x = nn.relu(jbn.linen.BatchNorm(not train, momentum=MOMENTUM)(x))
        return nn.Dense(NUM_CLASSES)(x)


@jax.jit
def step(variables, opt_state, images, labels):
    """One step of the optimizer and one update of the running statistics, from PARTS micro-batches."""

    def loss(params, moments, images, labels):
        collections = {**variables, **moments, "params": params}
        logits, new = Net().apply(collections, images, train=True, mutable=["batch_stats", "batch_moments"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), {"batch_moments": new["batch_moments"]}  # not the statistics after one part

    params, moments = variables["params"], {}
    for part in zip(jnp.split(images, PARTS), jnp.split(labels, PARTS), strict=True):
        grads, moments = jax.grad(loss, has_aux=True)(params, moments, *part)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)  # by 0, until the last part
    return jbn.tools.apply_moments({**variables, "params": params}, moments, momentum=MOMENTUM), opt_state


def main(steps: int = 200, data_dir: Path = Path(__file__).parent / "data" / "mnist") -> None:
    """Trains for so many steps of 512 images."""
    with one_line_errors():
        train_set, test_set = load_splits(data_dir)
    variables = Net().init(jax.random.key(0), train_set.images[:1], train=False)
    opt_state = OPTIMIZER.init(variables["params"])
    order = batches.epoch_order(0, 0, len(train_set.labels))
    expected = variables["batch_stats"]["pixels"]
    for number in range(steps):
        rows = order[np.arange(number * BATCH, (number + 1) * BATCH) % len(order)]
        variables, opt_state = step(variables, opt_state, train_set.images[rows], train_set.labels[rows])
        whole = jbn.moments(to_unit_range(train_set.images[rows]).reshape(BATCH, -1))
        expected = jbn.update(expected, whole, momentum=MOMENTUM)
    found = variables["batch_stats"]["pixels"]
    apart = max(float(jnp.abs(found[name] - expected[name]).max()) for name in ("mean", "var"))
    logits = Net().apply(variables, test_set.images, train=False)
    accuracy = np.mean(np.argmax(logits, -1) == test_set.labels)
    print(
        f"After {steps} updates, each from {PARTS} micro-batches of {BATCH // PARTS}, the test accuracy is"
        f" {accuracy:.4f}, and the running statistics of the pixels are those of whole batches of {BATCH}, to"
        f" {apart:.0e}."
    )


if __name__ == "__main__":
    tyro.cli(main)
