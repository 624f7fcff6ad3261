"""Is training faster with batch norm? One net, with and without, over a grid of learning rates.

    python examples/learning_rates.py

Five hidden layers of 100 relus learn MNIST by SGD in batches of 128, each net in the same number of steps,
from the same weights, without warm-up or decay. They are those of He et al. for relus, on standardized input,
so that the net without batch norm starts well. A rate "trains" a net if more than half of the test images
are recognized.

Reference: Bjorck, Gomes, Selman and Weinberger 2018, arXiv 1806.02375.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

from batches import whole_batches
from errors import one_line_errors
from figures import COLORS, LABEL, save_numbers, save_picture
from idx import MNIST, load_splits
from models import Plain
from parallel import initial_state
from progress import ProgressBar
from training import make_accuracy, make_train_steps

BATCH_SIZE, LAYERS = 128, 5
TRAINED = 0.5  # a rate trains a net that gets more than this part of the test images right
RATES = tuple(10 ** (power / 4) for power in range(-12, 9))  # 0.001 to 100
KINDS = {"with": True, "without": False}
NAMES = {"with": "with batch norm", "without": "without"}


def main(
    steps: int = 500, seed: int = 0, output: Path = Path("runs/learning_rates.png")
) -> dict[str, list[float]]:
    """Trains at all rates at once, draws the test accuracies and says what they show.

    Args:
      steps: of each net at each rate.
      seed: of the initial weights and of the order of the data.
      output: where the picture goes, and beside it the numbers.

    Returns:
      The rates, and the test accuracies with and without.
    """
    train_set, test_set = load_splits(MNIST)
    rows = whole_batches(seed, len(train_set.labels), BATCH_SIZE, steps)
    data, tests = jax.device_put((train_set, test_set))
    numbers: dict[str, Any] = {"rates": RATES}
    for kind, batch_norm in KINDS.items():
        net = Plain(LAYERS, 100, batch_norm)
        state = initial_state(net, optax.sgd(0.0), seed, train_set.images[:1])
        train_steps, accuracy = make_train_steps(net, optax.sgd), make_accuracy(net)

        @jax.jit
        @partial(jax.vmap, in_axes=(0, None, None))
        def run(rate, data, tests, state=state, train_steps=train_steps, accuracy=accuracy):
            end = train_steps(state, data[:1], data.labels, rows, rate, jax.random.key(0))
            return accuracy(end, tests[:1], tests.labels)

        with ProgressBar(kind, rows.size * len(RATES)) as bar:
            numbers[kind] = run(np.array(RATES, np.float32), data, tests).tolist()
            bar.update(rows.size * len(RATES))
    numbers = save_numbers(output, numbers, steps=steps, seed=seed)
    draw(numbers, output)
    print(sentence(numbers))
    return numbers


def sentence(numbers: Mapping[str, Any]) -> str:
    rates = np.array(numbers["rates"])
    ours, plain = (np.array(numbers[kind]) for kind in KINDS)
    largest = [max(rates[found > TRAINED], default=0.0) for found in (ours, plain)]
    small = int(np.argmin(np.abs(rates - 0.01)))
    return (
        f"The best accuracy is {ours.max():.4f} with batch norm, at {rates[ours.argmax()]:.2g}, and"
        f" {plain.max():.4f} without, at {rates[plain.argmax()]:.2g}; at 0.01 it is {ours[small]:.4f} and"
        f" {plain[small]:.4f}; the largest rate that trains is {largest[0]:.2g} and {largest[1]:.2g}."
    )


def draw(numbers: Mapping[str, Any], output: Path) -> None:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for kind in KINDS:
        axes.semilogx(numbers["rates"], numbers[kind], "o-", color=COLORS[kind], markersize=4)
        last = max((i for i, accuracy in enumerate(numbers[kind]) if accuracy > TRAINED), default=0)
        end = numbers["rates"][last], TRAINED  # beside the fall of the curve
        axes.annotate(NAMES[kind], end, (30, 0), color=COLORS[kind], **LABEL)
    axes.set(title="test accuracy", xlabel="learning rate", ylim=(0, 1.05))
    save_picture(figure, output)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
