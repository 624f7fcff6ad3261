"""What batch norm does to one unit: a batch before and after, in training and in evaluation.

    python examples/one_unit.py

The net of functional.py learns MNIST. Then one unit of its hidden layer is watched while a batch of 16
test images passes batch norm: x as it comes, x normalized by the mean and variance of the batch, and y
after scale and bias. In evaluation the running statistics take the place of the batch's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure

import functional
import jbn
from batches import whole_batches
from errors import one_line_errors
from figures import COLORS, INK, save_numbers, save_picture, table
from idx import MNIST, load_splits
from models import to_unit_range
from progress import ProgressBar

BATCH_SIZE = functional.BATCH_SIZE
SHOWN = 16  # images: so few that their mean is not that of the data
STAGES = ("x", "normalized", "y")


def main(
    steps: int = 500, seed: int = 0, output: Path = Path("runs/one_unit.png")
) -> dict[str, dict[str, list[float]]]:
    """Trains, passes one batch through batch norm, draws what becomes of one unit and says it.

    Args:
      steps: of training.
      seed: of the initial weights and of the order of the data.
      output: where the picture goes, and beside it the numbers.

    Returns:
      Mean and standard deviation over the batch at each stage, in training and in evaluation.
    """
    train_set, test_set = load_splits(MNIST)
    params, stats = functional.init(jax.random.key(seed), train_set.images[0].size)
    opt_state = functional.optimizer.init(params)
    with ProgressBar("one unit", steps * BATCH_SIZE) as bar:
        for rows in whole_batches(seed, len(train_set.labels), BATCH_SIZE, steps):
            batch = train_set.images[rows], train_set.labels[rows]
            params, stats, opt_state = functional.train_step(params, stats, opt_state, *batch)
            bar.update(BATCH_SIZE)
    x = to_unit_range(test_set.images[:SHOWN]).reshape(SHOWN, -1) @ params["hidden"]
    unit = int(np.argmax(np.abs(stats["mean"])))  # where there is most to see
    values = {
        mode: [np.asarray(stage)[:, unit] for stage in stages(params["norm"], stats, x, running)]
        for mode, running in (("training", False), ("evaluation", True))
    }
    numbers = {
        mode: {stage: [float(one.mean()), float(one.std())] for stage, one in zip(STAGES, found, strict=True)}
        for mode, found in values.items()
    }
    numbers = save_numbers(output, numbers, steps=steps, seed=seed)
    draw(values, output)
    print(report(numbers))
    print(sentence(numbers))
    return numbers


def stages(
    params: Mapping[str, jax.Array], stats: Mapping[str, jax.Array], x: jax.Array, running: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, x normalized, and y, each [batch, units]."""
    normalized, _ = jbn.batch_norm(None, stats, x, use_running_average=running)
    y, _ = jbn.batch_norm(params, stats, x, use_running_average=running)
    return x, normalized, y


def report(numbers: Mapping[str, Any]) -> str:
    """The table: mean and standard deviation of each stage."""
    rows = [
        [mode, *(f"{mean:z.2f}, {deviation:.2f}" for mean, deviation in found.values())]
        for mode, found in numbers.items()
    ]
    return table(["", *STAGES], *rows)


def sentence(numbers: Mapping[str, Any]) -> str:
    mean, deviation = numbers["training"]["x"]
    seen, spread = numbers["evaluation"]["normalized"]
    return (
        f"The batch comes with mean {mean:.2f} and standard deviation {deviation:.2f}; normalized by itself"
        f" it has 0 and 1, and by the running statistics {seen:.2f} and {spread:.2f}."
    )


def draw(values: Mapping[str, list[np.ndarray]], output: Path) -> None:
    """A dot for each image of the batch, and above it what the axis shows."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    titles = ("before: x", "normalized", "after scale and bias: y")
    heights = np.random.default_rng(0).uniform(-0.3, 0.3, SHOWN)  # so that dots do not hide each other
    for position, (axes, title) in enumerate(
        zip(figure.subplots(1, 3, sharex=True, sharey=True), titles, strict=True)
    ):
        for row, (mode, color) in enumerate((("evaluation", COLORS["other"]), ("training", COLORS["with"]))):
            found = values[mode][position]
            axes.plot(found, row + heights, ".", color=color, markersize=4)
            axes.plot([found.mean()] * 2, [row - 0.4, row + 0.4], color=color)
        axes.axvline(0, color=INK, linewidth=0.5)
        axes.set_title(title)
        axes.set_yticks((0, 1), ("in evaluation", "in training"))
    save_picture(figure, output)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
