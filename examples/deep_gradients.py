"""Gradients of deep nets at initialization, and what becomes of them in training.

    python examples/deep_gradients.py

Left: 40 layers of width 512 and a batch of 1024 random rows. A random cotangent of the output is propagated
back, and the squared norm of the gradient by each layer's weights is taken. With sigmoids and no batch norm
it vanishes, and batch norm holds it. With relus it is the other way round: He's initialization holds it,
and batch norm makes it grow towards the input, by pi / (pi - 1) a layer in mean-field theory, unless there
are skip connections.

Right: nets of 10 and 40 such layers, of width 64, learn MNIST for 1,500 steps of SGD in batches of 128, each
at the best of five learning rates from 0.003 to 0.3.

References: He et al. 2015, arXiv 1502.01852; Yang et al. 2019, arXiv 1902.08129.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from chex import ArrayTree
from matplotlib.figure import Figure

import jbn
from batches import check_seeds, whole_batches
from errors import one_line_errors
from figures import COLORS, label_ends, save_numbers, save_picture, table
from idx import MNIST, NUM_CLASSES, Split, load_splits
from models import standardized
from progress import ProgressBar

DEPTH, WIDTH, ROWS = 40, 512, 1024  # at initialization
SETTLED = DEPTH - 10  # layers: in the last ones the gradient is not yet what theory speaks of
THEORY = math.pi / (math.pi - 1)
DEPTHS, NARROW, BATCH_SIZE = (10, 40), 64, 128  # in training
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)


class Kind(NamedTuple):
    """A layer: y = activate(batch norm(x @ w)), or x + y with a skip connection. Else it has a bias.

    `gain` is the variance of the initial weights, times their number of inputs.
    """

    activate: Any
    batch_norm: bool
    skip: bool
    gain: float


KINDS = {
    "sigmoid": Kind(jax.nn.sigmoid, False, False, 1.0),
    "sigmoid, batch norm": Kind(jax.nn.sigmoid, True, False, 1.0),
    "relu": Kind(jax.nn.relu, False, False, 2.0),
    "relu, batch norm": Kind(jax.nn.relu, True, False, 2.0),
    "relu, batch norm, skip": Kind(jax.nn.relu, True, True, 2.0),
}


def main(
    steps: int = 1500, seeds: int = 3, output: Path = Path("runs/deep_gradients.png")
) -> dict[str, dict[str, Any]]:
    """Measures gradients at initialization, trains, draws both and says what shows.

    Args:
      steps: of training.
      seeds: over how many initializations the growth of gradients is averaged.
      output: where the picture goes, and beside it the numbers.

    Returns:
      Of each kind of layer the numbers.
    """
    check_seeds(seeds)
    train_set, test_set = load_splits(MNIST)
    rows = whole_batches(0, len(train_set.labels), BATCH_SIZE, steps)
    data = jax.device_put((train_set, test_set))
    numbers = {}
    for name, kind in KINDS.items():
        with ProgressBar(name, len(DEPTHS) * rows.size) as bar:
            keys = jax.random.split(jax.random.key(0), seeds)
            norms = np.stack([log_gradient_norms(kind, key) for key in keys])
            accuracies = []
            for depth in DEPTHS:
                accuracies.append(np.max(best_rate(kind, depth, *data, rows)).item())
                bar.update(rows.size)
        numbers[name] = {
            "growth": growth(norms).tolist(),
            "log10 norms": ((norms - norms[:, -1:]) / np.log(10)).mean(0).tolist(),
            "accuracies": accuracies,
        }
    numbers = save_numbers(output, numbers, steps=steps, seeds=seeds)
    draw(numbers, output)
    print(report(numbers))
    print(sentence(numbers))
    return numbers


def init(kind: Kind, depth: int, width: int, key: jax.Array) -> tuple[ArrayTree, ArrayTree]:
    """The layers, stacked: weights f32[depth, width, width], parameters and statistics f32[depth, width]."""
    w = jnp.sqrt(kind.gain / width) * jax.random.normal(key, (depth, width, width))
    norm, stats = jax.tree.map(lambda one: jnp.broadcast_to(one, (depth, width)), jbn.init(width))
    return {"w": w, "norm": norm}, stats


def layers(
    kind: Kind, params: ArrayTree, stats: ArrayTree, x: jax.Array, *, train: bool
) -> tuple[jax.Array, ArrayTree]:
    """All layers, in one loop, so that many compile as fast as one; and their new statistics."""

    def layer(x: jax.Array, of_layer: tuple[ArrayTree, ArrayTree]) -> tuple[jax.Array, ArrayTree]:
        params, stats = of_layer
        y = x @ params["w"]
        if kind.batch_norm:
            y, stats = jbn.batch_norm(params["norm"], stats, y, use_running_average=not train, momentum=0.9)
        else:
            y += params["norm"]["bias"][jnp.newaxis]
        y = kind.activate(y)
        return (x + y if kind.skip else y), stats

    return jax.lax.scan(layer, x, (params, stats))


@partial(jax.jit, static_argnums=0)
def log_gradient_norms(kind: Kind, key: jax.Array) -> jax.Array:
    """The logarithm f32[DEPTH] of the norm of the gradient by each layer's weights."""
    keys = jax.random.split(key, 3)
    params, stats = init(kind, DEPTH, WIDTH, keys[0])
    x, cotangent = (jax.random.normal(key, (ROWS, WIDTH)) for key in keys[1:])

    def output(w):
        return jnp.sum(cotangent * layers(kind, params | {"w": w}, stats, x, train=True)[0])

    gradients = jax.grad(output)(params["w"])
    largest = jnp.max(jnp.abs(gradients), (1, 2), keepdims=True)  # squares of what vanished would be 0
    return jnp.log(largest[:, 0, 0]) + jnp.log(jnp.sum((gradients / largest) ** 2, (1, 2))) / 2


def growth(log_norms: np.ndarray) -> np.ndarray:
    """By what factor the squared norm changes from one layer to the one before it, of each seed."""
    return np.exp(2 * (log_norms[:, 0] - log_norms[:, SETTLED]) / SETTLED)


@partial(jax.jit, static_argnums=(0, 1))
def best_rate(kind: Kind, depth: int, train_set: Split, test_set: Split, rows: jax.Array) -> jax.Array:
    """The test accuracies f32[rates] after training on `rows` of the data."""
    keys = jax.random.split(jax.random.key(0), 3)
    pixels = train_set.images[0].size
    params, stats = init(kind, depth, NARROW, keys[0])
    params["first"] = jax.random.normal(keys[1], (pixels, NARROW)) / math.sqrt(pixels)
    params["last"] = jax.random.normal(keys[2], (NARROW, NUM_CLASSES)) / math.sqrt(NARROW)

    def logits(params, stats, images, *, train):
        x = standardized(images).reshape(len(images), -1)
        hidden = {name: params[name] for name in ("w", "norm")}
        x, stats = layers(kind, hidden, stats, x @ params["first"], train=train)
        return x @ params["last"], stats

    def train(rate):
        def step(state, rows):
            def loss(params):
                found, stats = logits(params, state[1], train_set.images[rows], train=True)
                labels = train_set.labels[rows]
                return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean(), stats

            gradients, stats = jax.grad(loss, has_aux=True)(state[0])
            return (jax.tree.map(lambda p, g: p - rate * g, state[0], gradients), stats), None

        state, _ = jax.lax.scan(step, (params, stats), rows)
        found, _ = logits(*state, test_set.images, train=False)
        return jnp.mean(jnp.argmax(found, axis=-1) == test_set.labels)

    return jax.vmap(train)(jnp.array(RATES))


def report(numbers: Mapping[str, Any]) -> str:
    """The table."""
    head = ["layer", "growth a layer", *(f"accuracy, {depth} layers" for depth in DEPTHS)]
    rows = [
        [name, f"{np.mean(one['growth']):.3f}", *(f"{accuracy:.2f}" for accuracy in one["accuracies"])]
        for name, one in numbers.items()
    ]
    return table(head, *rows)


def sentence(numbers: Mapping[str, Any]) -> str:
    found = numbers["relu, batch norm"]["growth"]
    return (
        f"With relu and batch norm the squared norm grows by {np.mean(found):.3f} a layer, {min(found):.3f}"
        f" to {max(found):.3f} over {len(found)} seeds; theory says {THEORY:.3f}."
    )


def draw(numbers: Mapping[str, Any], output: Path) -> None:
    """Blue with batch norm and red without, dashed with sigmoids, dotted with skip connections."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    gradient_axes, accuracy_axes = figure.subplots(1, 2)
    lowest, gradient_ends, accuracy_ends = -4, [], []
    for name, found in numbers.items():
        kind = KINDS[name]
        color = COLORS["with" if kind.batch_norm else "without"]
        style = "dotted" if kind.skip else "solid" if kind.activate is jax.nn.relu else "dashed"
        norms, accuracies = found["log10 norms"], found["accuracies"]
        gradient_axes.plot(range(1, DEPTH + 1), norms, color=color, linestyle=style)
        shown = next(layer for layer, norm in enumerate(norms) if norm > lowest)
        gradient_ends.append((name, (shown + 1, norms[shown]), color))
        accuracy_axes.plot(range(len(DEPTHS)), accuracies, "o", color=color, linestyle=style)
        accuracy_ends.append((name, (len(DEPTHS) - 1, accuracies[-1]), color))
    gradient_axes.set(title="log10 of the gradient's norm", xlabel="layer")
    gradient_axes.set(xlim=(DEPTH + 1, 1), ylim=(lowest, 4))
    accuracy_axes.set(title="test accuracy", xlabel="layers", ylim=(0, 1))
    accuracy_axes.set_xticks(range(len(DEPTHS)), DEPTHS)
    label_ends(gradient_axes, gradient_ends)
    label_ends(accuracy_axes, accuracy_ends)
    save_picture(figure, output)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
