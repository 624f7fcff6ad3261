"""Batch norm whose outputs are made to jump about: is training still faster than without?

    python examples/moving_distributions.py

Is batch norm fast because the input of each unit keeps its distribution? Santurkar et al. took that away:
they add noise after every batch norm, whose mean and variance are drawn anew for each unit in each step.
Here the net is that of paper_figure1.py, three layers of 100 sigmoids on MNIST, with SGD at 0.5 in batches
of 60, from weights with a standard deviation of 0.03, and once more of 0.1: without batch norm, with it, and
with it and the noise,

    mean + deviation * N(0, 1),    mean from U(-0.5, 0.5), deviation from U(0, 0.5), both per unit and step

added to the input of each sigmoid, in training only. The drift is that of the median input to one sigmoid
of the last hidden layer, over 1,000 images, as training sees it.

Reference: Santurkar, Tsipras, Ilyas and Madry 2018, arXiv 1805.11604, section 2.1.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from batches import whole_batches
from errors import one_line_errors
from figures import COLORS, label_ends, save_numbers, save_picture
from idx import MNIST, Split, load_splits
from models import Sigmoids
from parallel import State
from progress import ProgressBar
from training import make_accuracy, train_in_parts

BATCH_SIZE, LEARNING_RATE = 60, 0.5
SPREADS = (0.03, 0.1)  # of the initial weights; all but when the goal is reached is of the first
NOISE = 0.5
GOAL = 0.95
STEPS_PER_CALL = 200  # after each call the nets are measured
WATCHED = 1000  # training images over which medians are taken
KINDS = {"without": (False, False), "with": (True, False), "noisy": (True, True)}
NAMES = {"without": "without", "with": "with batch norm", "noisy": "with batch norm and noise"}
LINES = {"without": COLORS["without"], "with": COLORS["with"], "noisy": COLORS["other"]}


def noise(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """f32[batch, units], of another mean and another standard deviation for each unit."""
    keys = jax.random.split(key, 3)
    mean = jax.random.uniform(keys[0], (1, shape[1]), minval=-NOISE, maxval=NOISE)
    deviation = jax.random.uniform(keys[1], (1, shape[1]), maxval=NOISE)
    return mean + deviation * jax.random.normal(keys[2], shape)


def disturb(key: jax.Array, x: jax.Array) -> jax.Array:
    return x + noise(key, x.shape)


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
    train_set, test_set = jax.device_put(load_splits(MNIST))
    rows = whole_batches(seed, len(train_set.labels), BATCH_SIZE, steps)
    numbers = {}
    for kind, (batch_norm, moves) in KINDS.items():
        found = []
        with ProgressBar(NAMES[kind], len(SPREADS) * rows.size) as bar:
            for spread in SPREADS:
                net = Sigmoids(batch_norm, spread, disturb if moves else None)
                parts = train_in_parts(net, LEARNING_RATE, seed, train_set, rows, STEPS_PER_CALL, bar)
                found.append(summary(*watch(net, parts, train_set.images[:WATCHED], test_set)))
        numbers[kind] = found[0] | {"goal from larger weights": found[1]["goal"]}
    numbers = save_numbers(output, numbers, steps=steps, seed=seed)
    draw(numbers, output)
    print(sentence(numbers))
    return numbers


def watch(
    net: Sigmoids, parts: Iterable[tuple[int, State, jax.Array]], images: jax.Array, test_set: Split
) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """After how many steps it was measured, the test accuracies f32[M], and the medians f32[M, 100].

    These are of the input to each sigmoid of the last hidden layer, in training on the images.
    """
    accuracy = make_accuracy(net)

    @jax.jit
    def measure(
        state: State, key: jax.Array, images: jax.Array, test_set: Split
    ) -> tuple[jax.Array, jax.Array]:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        options = {"train": True, "rngs": {"noise": key}, "mutable": ["intermediates", "batch_stats"]}
        inputs = net.apply(variables, images, **options)[1]["intermediates"]["input"][-1]
        return accuracy(state, test_set[:1], test_set.labels), jnp.median(inputs, axis=0)

    steps, measured = zip(
        *((done, measure(state, key, images, test_set)) for done, state, key in parts), strict=True
    )
    return steps, *map(np.stack, zip(*measured, strict=True))


def summary(steps: tuple[int, ...], accuracies: np.ndarray, medians: np.ndarray) -> dict[str, Any]:
    """When the goal was seen, how far a median moves at a time, and the curves."""
    reached = [step for step, accuracy in zip(steps, accuracies, strict=True) if accuracy >= GOAL]
    moved = np.abs(np.diff(medians, axis=0))
    by_drift = np.argsort(np.ptp(medians, axis=0))
    typical = by_drift[len(by_drift) // 2]  # as many units drift more as drift less
    return {
        "goal": reached[0] if reached else None,
        "moved": float(np.median(moved)),
        "steps": steps,
        "accuracies": accuracies.tolist(),
        "medians": medians[:, typical].tolist(),
    }


def sentence(numbers: dict[str, Any]) -> str:
    goals = [
        ["never" if one[goal] is None else f"after {one[goal]:,} steps" for one in numbers.values()]
        for goal in ("goal", "goal from larger weights")
    ]
    (without, ours, noisy), larger = goals
    plain_end, our_end, noisy_end = (one["accuracies"][-1] for one in numbers.values())
    plain_drift, drift, noisy_drift = (one["moved"] for one in numbers.values())
    return (
        f"With the noise {GOAL:.0%} is reached {noisy}, with batch norm alone {ours}, and without {without};"
        f" from larger weights {larger[2]}, {larger[1]} and {larger[0]}. In the end the test accuracy is"
        f" {noisy_end:.4f}, {our_end:.4f} and {plain_end:.4f}. From one measurement to the next, the median"
        f" input to a sigmoid moves by {noisy_drift:.3f}, against {drift:.3f} and {plain_drift:.3f}; of all"
        " units and steps this is the median."
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
