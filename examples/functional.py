"""Batch norm with no module: a net of two matrices and one pure function, trained on MNIST.

    python examples/functional.py

Everything that a Flax layer would keep is here in the open: `params` is what the gradient is for, and
`batch_stats` goes into each step and comes out of it anew. Evaluation only reads it.
"""

import jax
import jax.numpy as jnp
import optax
import tyro

import jbn
from batches import whole_batches
from errors import one_line_errors
from idx import MNIST, NUM_CLASSES, load_splits
from models import to_unit_range
from progress import ProgressBar

BATCH_SIZE, HIDDEN = 128, 128
optimizer = optax.adam(0.001)


def init(key, features):
    """The parameters and the running statistics. Before a batch norm no bias is needed: it has one."""
    keys = jax.random.split(key)
    kernel = jax.nn.initializers.lecun_normal()
    norm, batch_stats = jbn.init(HIDDEN)
    params = {
        "hidden": kernel(keys[0], (features, HIDDEN)),
        "norm": norm,
        "logits": kernel(keys[1], (HIDDEN, NUM_CLASSES)),
    }
    return params, batch_stats


def net(params, batch_stats, images, *, train):
    """The logits, and the running statistics: new ones in training, in evaluation those that came."""
    x = to_unit_range(images).reshape(len(images), -1) @ params["hidden"]
    x, batch_stats = jbn.batch_norm(
        params["norm"], batch_stats, x, use_running_average=not train, momentum=0.9
    )
    return jax.nn.relu(x) @ params["logits"], batch_stats


@jax.jit
def train_step(params, batch_stats, opt_state, images, labels):
    def loss(params):
        logits, new_stats = net(params, batch_stats, images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new_stats

    gradients, batch_stats = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(gradients, opt_state)
    return optax.apply_updates(params, updates), batch_stats, opt_state


@jax.jit
def accuracy(params, batch_stats, images, labels):
    logits, _ = net(params, batch_stats, images, train=False)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def main(steps: int = 1000, seed: int = 0) -> float:
    """Trains, and says and returns the test accuracy."""
    train_set, test_set = load_splits(MNIST)
    params, batch_stats = init(jax.random.key(seed), train_set.images[0].size)
    opt_state = optimizer.init(params)
    with ProgressBar("functional", steps * BATCH_SIZE) as bar:
        for rows in whole_batches(seed, len(train_set.labels), BATCH_SIZE, steps):
            batch = train_set.images[rows], train_set.labels[rows]
            params, batch_stats, opt_state = train_step(params, batch_stats, opt_state, *batch)
            bar.update(BATCH_SIZE)
    result = float(accuracy(params, batch_stats, *test_set))
    print(f"With batch norm as a pure function the test accuracy is {result:.4f} after {steps:,} steps.")
    return result


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
