"""Gradients of deep nets at initialization, and what becomes of them in training.

    python examples/deep_gradients.py

Left: 40 layers of width 512 and a batch of 1024 random rows. A random cotangent of the output is propagated
back, and the squared norm of the gradient by each layer's weights is taken. With sigmoids and no batch norm
it vanishes, and batch norm holds it. With relus it is the other way round: He's initialization holds it,
and batch norm makes it grow towards the input, by pi / (pi - 1) a layer in mean-field theory, unless there
are skip connections.

Right: nets of 10, 40 and 100 such layers, of width 64, learn MNIST by SGD in batches of 64, each at the best
of seven learning rates from 0.001 to 1, which is chosen on training images that are held out.

In two minutes there is time for 150 steps of one seed. The picture on the page "What batch norm does" is of

    python examples/deep_gradients.py --steps 1500 --seeds 3

References: He et al. 2015, arXiv 1502.01852; Yang et al. 2019, arXiv 1902.08129.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

from batches import check_seeds, whole_batches
from errors import one_line_errors
from figures import COLORS, label_ends, save_numbers, save_picture, table
from idx import MNIST, NUM_CLASSES, Split, load_splits
from jbn.linen import BatchNorm
from models import standardized
from parallel import initial_state
from progress import ProgressBar
from training import make_accuracy, make_train_steps

DEPTH, WIDTH, ROWS = 40, 512, 1024  # at initialization
SETTLED = DEPTH - 10  # layers: in the last ones the gradient is not yet what theory speaks of
THEORY = math.pi / (math.pi - 1)
DEPTHS, NARROW, BATCH_SIZE = (10, 40, 100), 64, 64  # in training
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
HELD_OUT = 10_000  # training images on which the rate is chosen


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
    "sigmoid, larger weights": Kind(jax.nn.sigmoid, False, False, 16.0),  # a sigmoid's slope is at most 1 / 4
    "sigmoid, batch norm": Kind(jax.nn.sigmoid, True, False, 1.0),
    "relu": Kind(jax.nn.relu, False, False, 2.0),
    "relu, batch norm": Kind(jax.nn.relu, True, False, 2.0),
    "relu, batch norm, skip": Kind(jax.nn.relu, True, True, 2.0),
}


def main(
    steps: int = 150, seeds: int = 1, output: Path = Path("runs/deep_gradients.png")
) -> dict[str, dict[str, Any]]:
    """Measures gradients at initialization, trains, draws both and says what shows.

    Args:
      steps: of training.
      seeds: over how many initializations, and orders of the data, results are averaged.
      output: where the picture goes, and beside it the numbers.

    Returns:
      Of each kind of layer the numbers.
    """
    check_seeds(seeds)
    (images, labels), test_set = load_splits(MNIST)
    held_out = Split(images[:HELD_OUT], labels[:HELD_OUT])
    train_set = Split(images[HELD_OUT:], labels[HELD_OUT:])
    count = len(train_set.labels)
    rows = np.stack([whole_batches(seed, count, BATCH_SIZE, steps) for seed in range(seeds)])
    data = jax.device_put((train_set, held_out, test_set))
    numbers = {}
    for name, kind in KINDS.items():
        with ProgressBar(name, sum(DEPTHS) * rows.size) as bar:
            keys = jax.random.split(jax.random.key(0), seeds)
            norms = np.stack([log_gradient_norms(kind, key) for key in keys])
            found = {"growth": growth(norms).tolist(), "rates": [], "accuracies": [], "deviations": []}
            for depth in DEPTHS:
                chosen, tested = accuracies(kind, depth, data, rows)
                best = chosen.mean(1).argmax()
                found["rates"].append(RATES[best])
                found["accuracies"].append(tested[best].mean().item())
                found["deviations"].append(tested[best].std().item())
                bar.update(depth * rows.size)
        relative = (norms - norms[:, -1:]) / np.log(10)
        numbers[name] = found | {"log10 norms": relative.mean(0).tolist()}
    numbers = save_numbers(output, numbers, steps=steps, seeds=seeds)
    draw(numbers, output)
    print(report(numbers))
    print(sentence(numbers))
    return numbers


class Layer(nn.Module):
    """One of equal layers, as `nn.scan` asks for it: there is nothing else that it returns."""

    kind: Kind
    width: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        kernel_init = nn.initializers.variance_scaling(self.kind.gain, "fan_in", "normal")
        y = nn.Dense(self.width, use_bias=not self.kind.batch_norm, kernel_init=kernel_init)(x)
        if self.kind.batch_norm:
            y = BatchNorm(not self.train, momentum=0.9)(y)
        y = self.kind.activate(y)
        return (x + y if self.kind.skip else y), None


def layers(kind: Kind, depth: int, width: int, *, train: bool) -> nn.Module:
    """So many layers in one loop, so that a hundred compile as fast as one; their parameters are stacked."""
    split = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    return nn.scan(Layer, length=depth, **split)(kind, width, train)


class Net(nn.Module):
    """The layers between two linear ones, for images."""

    kind: Kind
    depth: int
    width: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Dense(self.width, use_bias=False)(standardized(images).reshape(len(images), -1))
        x, _ = layers(self.kind, self.depth, self.width, train=train)(x)
        return nn.Dense(NUM_CLASSES, use_bias=False)(x)


@partial(jax.jit, static_argnums=0)
def log_gradient_norms(kind: Kind, key: jax.Array) -> jax.Array:
    """The logarithm f32[DEPTH] of the norm of the gradient by each layer's weights."""
    keys = jax.random.split(key, 3)
    x, cotangent = (jax.random.normal(key, (ROWS, WIDTH)) for key in keys[1:])
    net = layers(kind, DEPTH, WIDTH, train=True)
    variables = net.init(keys[0], x)

    def output(params):
        (y, _), _ = net.apply(variables | {"params": params}, x, mutable=["batch_stats"])
        return jnp.sum(cotangent * y)

    gradients = jax.grad(output)(variables["params"])["Dense_0"]["kernel"]
    largest = jnp.max(jnp.abs(gradients), (1, 2), keepdims=True)  # squares of what vanished would be 0
    return jnp.log(largest[:, 0, 0]) + jnp.log(jnp.sum((gradients / largest) ** 2, (1, 2))) / 2


def growth(log_norms: np.ndarray) -> np.ndarray:
    """By what factor the squared norm changes from one layer to the one before it, of each seed."""
    return np.exp(2 * (log_norms[:, 0] - log_norms[:, SETTLED]) / SETTLED)


def accuracies(kind: Kind, depth: int, data: Sequence[Split], rows: np.ndarray) -> np.ndarray:
    """After steps on `rows` i64[seeds, steps, batch] of the first of the data: accuracies on the others.

    Returns:
      f32[data - 1, rates, seeds].
    """
    net = Net(kind, depth, NARROW)
    train_steps, accuracy = make_train_steps(net, optax.sgd), make_accuracy(net)

    @jax.jit
    @partial(jax.vmap, in_axes=(None, None, 0, 0), out_axes=-1)
    @partial(jax.vmap, in_axes=(None, 0, None, None), out_axes=-1)
    def run(data, rate, rows, seed):
        (images, labels), *others = data
        state = initial_state(net, optax.sgd(rate), seed, images[:1])
        end = train_steps(state, (images,), labels, rows, rate, jax.random.key(seed))
        return jnp.stack([accuracy(end, other[:1], other.labels) for other in others])

    return np.asarray(run(data, jnp.array(RATES), rows, jnp.arange(len(rows))))


def report(numbers: Mapping[str, Any]) -> str:
    """The table."""
    head = ["layer", "growth a layer", *(f"accuracy, {depth} layers" for depth in DEPTHS)]
    rows = []
    for name, one in numbers.items():
        pairs = zip(one["accuracies"], one["deviations"], strict=True)
        rows.append(
            [name, f"{np.mean(one['growth']):.3f}", *(f"{mean:.2f} +- {std:.2f}" for mean, std in pairs)]
        )
    return table(head, *rows)


def sentence(numbers: Mapping[str, Any]) -> str:
    found = numbers["relu, batch norm"]["growth"]
    several = f", {min(found):.3f} to {max(found):.3f} over {len(found)} seeds" if len(found) > 1 else ""
    return (
        f"With relu and batch norm the squared norm grows by {np.mean(found):.3f} a layer{several};"
        f" theory says {THEORY:.3f}."
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
