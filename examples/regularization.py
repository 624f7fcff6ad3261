"""Does batch norm regularize? Few images, and the gap between training and test, beside that of dropout.

    python examples/regularization.py

Two hidden layers of 128 relus learn 256 images of MNIST, and take the same number of steps of Adam at 0.001
whatever the batch. Only the noise of small batches can regularize: if the batch is the whole training set,
every step measures the same images.

References: Ioffe and Szegedy 2015, arXiv 1502.03167, section 3.4; Luo et al. 2019, arXiv 1809.00846.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

from batches import check_seeds, whole_batches
from errors import UsageError, one_line_errors
from figures import COLORS, label_ends, save_numbers, save_picture, table
from idx import MNIST, Split, load_splits
from models import Plain
from parallel import initial_state
from progress import ProgressBar
from training import make_accuracy, make_train_steps

FEW, LEARNING_RATE = 256, 0.001
MOMENTUM = 0.99  # with 0.9, running statistics of batches of 4 would be noise themselves
SIZES = (4, 16, 64, 256)
KINDS = {
    "without": (False, 0.0),
    "with batch norm": (True, 0.0),
    "with dropout": (False, 0.5),
    "with both": (True, 0.5),
}


def main(
    steps: int = 2000, seeds: int = 5, output: Path = Path("runs/regularization.png")
) -> dict[str, dict[str, list[float]]]:
    """Trains every kind at every batch size, draws the test accuracies and prints them.

    Args:
      steps: of each net.
      seeds: each with its own images, weights and order; trained at once, and averaged.
      output: where the picture goes, and beside it the numbers.

    Returns:
      Of each kind, training and test accuracies for each size, and the spread of the latter over seeds.
    """
    check_seeds(seeds)
    train_set, test_set = load_splits(MNIST)
    if seeds * FEW > len(train_set.labels):
        raise UsageError(f"--seeds {seeds}: expected {len(train_set.labels) // FEW} or fewer")
    order = np.random.default_rng(0).permutation(len(train_set.labels))[: seeds * FEW].reshape(seeds, FEW)
    few = jax.device_put(Split(train_set.images[order], train_set.labels[order]))
    numbers = {}
    for name, options in KINDS.items():
        found = []
        with ProgressBar(name, seeds * steps * sum(SIZES)) as bar:
            for size in SIZES:
                rows = np.stack([whole_batches(seed, FEW, size, steps) for seed in range(seeds)])
                found.append(run(Plain(2, 128, *options, MOMENTUM), few, test_set, rows))
                bar.update(rows.size)
        trained, tested = np.array(found).swapaxes(0, 1)  # f32[sizes, seeds]
        numbers[name] = {
            "train": trained.mean(1).tolist(),
            "test": tested.mean(1).tolist(),
            "deviation": tested.std(1).tolist(),
        }
    numbers = save_numbers(output, numbers, steps=steps, seeds=seeds)
    draw(numbers, output)
    print(report(numbers))
    print(sentence(numbers))
    return numbers


def run(net: Plain, few: Split, test_set: Split, rows: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Training and test accuracies f32[seeds] after steps on `rows` i64[seeds, steps, batch]."""
    train_steps, accuracy = make_train_steps(net, optax.adam), make_accuracy(net)

    @jax.jit
    @jax.vmap
    def of_seed(few, rows, seed):
        state = initial_state(net, optax.adam(LEARNING_RATE), seed, few.images[:1])
        end = train_steps(state, few[:1], few.labels, rows, LEARNING_RATE, jax.random.key(seed))
        return accuracy(end, few[:1], few.labels), accuracy(end, test_set[:1], test_set.labels)

    return of_seed(few, rows, jnp.arange(len(rows)))


def report(numbers: Mapping[str, Any]) -> str:
    """The table: test accuracies, and by how much the training accuracy is higher."""
    rows = []
    for name, found in numbers.items():
        pairs = zip(found["test"], found["train"], strict=True)
        rows.append([name, *(f"{test:.3f} ({train - test:+.3f})" for test, train in pairs)])
    return table(["images of a batch", *SIZES], *rows)


def sentence(numbers: Mapping[str, Any]) -> str:
    lowest = min(min(found["train"]) for found in numbers.values())
    widest = max(max(found["deviation"]) for found in numbers.values())
    return (
        f"On average over seeds, the training accuracy is at least {lowest:.3f}; over seeds the test"
        f" accuracies have a standard deviation of up to {widest:.3f}."
    )


def draw(numbers: Mapping[str, Any], output: Path) -> None:
    """Test accuracies, with a standard deviation to each side; what has dropout is dashed."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes, ends = figure.subplots(), []
    for name, found in numbers.items():
        batch_norm, dropout = KINDS[name]
        color = COLORS["with" if batch_norm else "without"]
        style = {"fmt": "o--" if dropout else "o-", "color": color, "markersize": 4, "elinewidth": 0.8}
        axes.errorbar(SIZES, found["test"], found["deviation"], **style)
        ends.append((name, (SIZES[-1], found["test"][-1]), color))
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, SIZES)
    axes.set(title="test accuracy", xlabel="images of a batch")
    label_ends(axes, ends)
    save_picture(figure, output)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
