"""Batch norm whose outputs are made to jump about: training is no slower for it.

    python examples/moving_distributions.py

Is batch norm fast because the input of each unit keeps its distribution? Santurkar et al. took that away:
they add noise after every batch norm, whose mean and variance are drawn anew for each unit in each step.
Here the net is that of paper_figure1.py, three layers of 100 sigmoids on MNIST, with SGD at 0.5 in batches
of 60: without batch norm, with it, and with it and the noise,

    mean + deviation * N(0, 1),    mean from U(-0.5, 0.5), deviation from U(0, 0.5), both per unit and step

added to the input of each sigmoid, in training only. The drift is that of the median input to one sigmoid
of the last hidden layer, over 1,000 images, as training sees it.

Reference: Santurkar, Tsipras, Ilyas and Madry 2018, arXiv 1805.11604, section 2.1.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from batches import whole_batches
from errors import one_line_errors
from figures import COLORS, label_ends, save_numbers, save_picture
from idx import MNIST, NUM_CLASSES, Split, load_splits
from jbn.linen import BatchNorm
from parallel import State, initial_state
from progress import ProgressBar
from training import make_accuracy, make_train_steps

BATCH_SIZE, HIDDEN, SPREAD, LEARNING_RATE = 60, 100, 0.03, 0.5
NOISE = 0.5
GOAL = 0.95
STEPS_PER_CALL = 200  # after each call the nets are measured
WATCHED = 1000  # training images over which medians are taken
KINDS = {"without": (False, False), "with": (True, False), "noisy": (True, True)}
NAMES = {"without": "without", "with": "with batch norm", "noisy": "with batch norm and noise"}
LINES = {"without": COLORS["without"], "with": COLORS["with"], "noisy": COLORS["other"]}


class Net(nn.Module):
    """Three layers of sigmoids from small random weights, as in the paper.

    Attributes:
      batch_norm: whether it stands before each sigmoid.
      noisy: whether training moves the input of each sigmoid about.
    """

    batch_norm: bool
    noisy: bool

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        small = nn.initializers.normal(SPREAD)
        y = jnp.where(images.reshape(images.shape[0], -1) > 127, 1.0, 0.0)
        for _ in range(3):
            x = nn.Dense(HIDDEN, use_bias=not self.batch_norm, kernel_init=small)(y)
            if self.batch_norm:
                x = BatchNorm(use_running_average=not train, momentum=0.9)(x)
            if self.noisy and train:
                x += noise(self.make_rng("noise"), x.shape)
            self.sow("intermediates", "input", x)
            y = nn.sigmoid(x)
        return nn.Dense(NUM_CLASSES, kernel_init=small)(y)


def noise(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """f32[batch, units], of another mean and another deviation for each unit."""
    keys = jax.random.split(key, 3)
    mean = jax.random.uniform(keys[0], (1, shape[1]), minval=-NOISE, maxval=NOISE)
    deviation = jax.random.uniform(keys[1], (1, shape[1]), maxval=NOISE)
    return mean + deviation * jax.random.normal(keys[2], shape)


def main(
    steps: int = 10_000, seed: int = 0, output: Path = Path("runs/moving_distributions.png")
) -> dict[str, Any]:
    """Trains the three nets, draws their curves and the drift, and says what they show.

    Args:
      steps: of each net.
      seed: of the initial weights, of the order of the data and of the noise.
      output: where the picture goes, and beside it the numbers.

    Returns:
      The numbers.
    """
    train_set, test_set = load_splits(MNIST)
    rows = whole_batches(seed, len(train_set.labels), BATCH_SIZE, steps)
    data = jax.device_put((train_set, test_set))
    curves = {}
    for kind, options in KINDS.items():
        net = Net(*options)
        state = initial_state(net, optax.sgd(LEARNING_RATE), seed, train_set.images[:1])
        with ProgressBar(NAMES[kind], rows.size) as bar:
            curves[kind] = train(net, state, rows, seed, *data, bar)
    numbers = {kind: summary(*curve) for kind, curve in curves.items()}
    numbers = save_numbers(output, numbers, steps=steps, seed=seed)
    draw(numbers, output)
    print(sentence(numbers))
    return numbers


def train(
    net: Net, state: State, rows: np.ndarray, seed: int, train_set: Split, test_set: Split, bar: ProgressBar
) -> tuple[list[int], list[float], np.ndarray]:
    """After how many steps it was measured, the test accuracies, and the median inputs f32[M, 100]."""
    train_steps = jax.jit(make_train_steps(net, optax.sgd), donate_argnums=0)
    accuracy, medians = jax.jit(make_accuracy(net)), make_medians(net)
    steps, accuracies, found = [], [], []
    for first in range(0, len(rows), STEPS_PER_CALL):
        some, key = rows[first : first + STEPS_PER_CALL], jax.random.key(seed + first)
        state = train_steps(state, train_set[:1], train_set.labels, some, LEARNING_RATE, key)
        steps.append(first + len(some))
        accuracies.append(float(accuracy(state, test_set[:1], test_set.labels)))
        found.append(np.asarray(medians(state, train_set.images[:WATCHED], key)))
        bar.update(some.size)
    return steps, accuracies, np.stack(found)


def make_medians(net: Net) -> Callable[[State, jax.Array, jax.Array], jax.Array]:
    """The median f32[100] of the input to each sigmoid of the last hidden layer, in training."""

    def medians(state: State, images: jax.Array, key: jax.Array) -> jax.Array:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        options = {"train": True, "rngs": {"noise": key}, "mutable": ["intermediates", "batch_stats"]}
        _, seen = net.apply(variables, images, **options)
        return jnp.median(seen["intermediates"]["input"][-1], axis=0)

    return jax.jit(medians)


def summary(steps: list[int], accuracies: list[float], medians: np.ndarray) -> dict[str, Any]:
    """When the goal was seen, how far a median moves at a time, and the curves."""
    reached = [step for step, accuracy in zip(steps, accuracies, strict=True) if accuracy >= GOAL]
    moved = np.abs(np.diff(medians, axis=0))
    typical = np.argsort(np.ptp(medians, axis=0))[HIDDEN // 2]  # as many units drift more as drift less
    return {
        "goal": reached[0] if reached else None,
        "moved": float(np.median(moved)) if len(moved) else 0.0,
        "steps": steps,
        "accuracies": accuracies,
        "medians": medians[:, typical].tolist(),
    }


def sentence(numbers: dict[str, Any]) -> str:
    goals = ["never" if one["goal"] is None else f"after {one['goal']:,} steps" for one in numbers.values()]
    without, ours, noisy = (one["accuracies"][-1] for one in numbers.values())
    plain_drift, drift, noisy_drift = (one["moved"] for one in numbers.values())
    return (
        f"With the noise {GOAL:.0%} is reached {goals[2]}, with batch norm alone {goals[1]}, and without"
        f" {goals[0]}; in the end the test accuracy is {noisy:.4f}, {ours:.4f} and {without:.4f}. From one"
        f" measurement to the next, the median input to a sigmoid moves by {noisy_drift:.3f}, against"
        f" {drift:.3f} and {plain_drift:.3f}; of all units and steps this is the median."
    )


def draw(numbers: dict[str, Any], output: Path) -> None:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    accuracy_axes, drift_axes = figure.subplots(1, 2)
    accuracy_axes.set(title="test accuracy", ylim=(0.8, 1.0))
    drift_axes.set_title("median input to a typical sigmoid, in training")
    for axes, what in ((accuracy_axes, "accuracies"), (drift_axes, "medians")):
        ends = []
        for kind, found in numbers.items():
            axes.plot(found["steps"], found[what], color=LINES[kind], linewidth=1)
            ends.append((NAMES[kind], (found["steps"][-1], found[what][-1]), LINES[kind]))
        label_ends(axes, ends)
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    save_picture(figure, output)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
