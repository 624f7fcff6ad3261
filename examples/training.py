"""Training steps of a net, one or many in a call, and the test accuracy.

What the functions that begin with `make` return is pure: `jax.vmap` runs it for many seeds or rates at once.
"""

from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from idx import Split
from parallel import State, initial_state, updated
from progress import ProgressBar

Inputs = tuple[jax.Array, ...]


def make_train_step(
    model: nn.Module, make_optimizer: Callable[[jax.Array], optax.GradientTransformation]
) -> Callable[[State, Inputs, jax.Array, jax.Array, jax.Array, jax.Array], State]:
    """A function that takes one step, on `rows` i32[batch] of the data.

    The model is called with the inputs of a batch, `train=True`, and a key for what it draws, if anything.
    The optimizer is made anew for the learning rate, which may be one of many under `jax.vmap`.
    """

    def train_step(state, inputs, labels, rows, rate, key):
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            batch = (values[rows] for values in inputs)
            apply = {"train": True, "mutable": ["batch_stats"], "rngs": {"noise": key}}
            logits, new = model.apply(variables, *batch, **apply)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
            return losses.mean(), new.get("batch_stats", {})

        gradients, batch_stats = jax.grad(loss, has_aux=True)(state.params)
        return updated(make_optimizer(rate), state, batch_stats, gradients)

    return train_step


def make_train_steps(
    model: nn.Module, make_optimizer: Callable[[jax.Array], optax.GradientTransformation]
) -> Callable[[State, Inputs, jax.Array, jax.Array, jax.Array, jax.Array], State]:
    """A step for each of `rows` i32[steps, batch], which costs a small net less than a call for each.

    It is for nets of linear layers: on a CPU a convolution within a loop takes many times as long.
    """
    train_step = make_train_step(model, make_optimizer)

    def train_steps(state, inputs, labels, rows, rate, key):
        def step(state, drawn):
            return train_step(state, inputs, labels, drawn[0], rate, drawn[1]), None

        return jax.lax.scan(step, state, (rows, jax.random.split(key, len(rows))))[0]

    return train_steps


def train_in_parts(
    net: nn.Module,
    rate: float,
    seed: int,
    data: Split,
    rows: np.ndarray,
    size: int,
    bar: ProgressBar,
) -> Iterator[tuple[int, State, jax.Array]]:
    """Trains a new net by SGD on `rows` i64[steps, batch] of the data, `size` steps in a call.

    Yields:
      Before the first step, and after each call: how many steps were taken, the state, and a key to draw by.
      The next call takes the state's memory, so what is of interest has to be computed before.
    """
    train_steps = jax.jit(make_train_steps(net, optax.sgd), donate_argnums=0)
    state, key = initial_state(net, optax.sgd(rate), seed, data.images[:1]), jax.random.key(seed)
    for first in range(0, len(rows), size):
        some, drawn = rows[first : first + size], jax.random.fold_in(key, first)
        yield first, state, drawn
        state = train_steps(state, data[:1], data.labels, some, rate, drawn)
        bar.update(some.size)
    yield len(rows), state, jax.random.fold_in(key, len(rows))


def make_accuracy(model: nn.Module) -> Callable[[State, Inputs, jax.Array], jax.Array]:
    """The share of labels that the model gets right in evaluation."""

    def accuracy(state, inputs, labels):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = model.apply(variables, *inputs, train=False)
        return jnp.mean(jnp.argmax(logits, axis=-1) == labels)

    return accuracy
