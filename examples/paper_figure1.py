"""Figure 1 of the batch norm paper, reproduced on MNIST: one net with and without it, 50,000 steps each.

    python examples/paper_figure1.py                    a few minutes on two cores
    python examples/paper_figure1.py --spread 0.1       larger weights to start from, see below

The paper trains three hidden layers of 100 sigmoids on binary images, in batches of 60, from small random
Gaussian weights. How small it does not say, nor which optimizer it uses: here the weights start with a
standard deviation of 0.03, and both nets take plain SGD at 0.5, the same batches and the same first weights.
The smaller those are, the longer the plain net stands still; the lead of batch norm is a matter of that. To
95 % the two need 2,600 and 7,400 steps from 0.03, 2,600 and 5,600 from 0.05, and from 0.1 2,600 (3,000 on
another machine) and 3,400.

Reference: Ioffe and Szegedy 2015, arXiv 1502.03167, section 4.1.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from batches import whole_batches
from errors import one_line_errors
from figures import INK, LABEL, save_picture
from idx import MNIST, Split, load_splits
from models import Sigmoids
from parallel import State
from progress import ProgressBar
from training import make_accuracy, train_in_parts

BATCH_SIZE = 60
PERCENTILES = (15, 50, 85)
GOAL = 0.95
STEPS_PER_CALL = 200  # after each call both nets are measured
WATCHED = 1000  # test images over which percentiles are taken
COLORS = {"with batch norm": "tab:blue", "without": "tab:red"}


class History(NamedTuple):
    """What was measured while a net was trained.

    `steps` i64[M]; `accuracy` f32[M] on the test set; `percentiles` f32[M, 3, 100] of the input to each
    sigmoid of the last hidden layer.
    """

    steps: np.ndarray
    accuracy: np.ndarray
    percentiles: np.ndarray

    def steps_to_goal(self) -> int | None:
        """When the test accuracy was first seen at `GOAL`, if ever."""
        reached = self.steps[self.accuracy >= GOAL]
        return int(reached[0]) if len(reached) else None

    def typical(self) -> np.ndarray:
        """The percentiles f32[M, 3] of a typical sigmoid: as many drift more as drift less."""
        order = np.argsort(drift(self.percentiles))
        return self.percentiles[..., order[len(order) // 2]]


def drift(percentiles: np.ndarray) -> np.ndarray:
    """How far the median moves, from the lowest it is to the highest."""
    return np.ptp(percentiles[:, PERCENTILES.index(50)], axis=0)


def main(
    steps: int = 50_000,
    seed: int = 0,
    learning_rate: float = 0.5,
    spread: float = 0.03,
    output: Path = Path("runs/paper_figure1.png"),
) -> dict[str, History]:
    """Trains both nets, draws the figure and says what it shows.

    Args:
      steps: of each net.
      seed: of the initial weights and of the order of the data.
      learning_rate: of plain SGD, for both nets.
      spread: the standard deviation of the initial weights.
      output: where the picture goes.

    Returns:
      What was measured of each net.
    """
    train_set, test_set = jax.device_put(load_splits(MNIST))
    rows = whole_batches(seed, len(train_set.labels), BATCH_SIZE, steps)
    histories = {}
    for name in COLORS:
        # Keys depend on the seed and on the names of layers, so both nets get the same weights.
        net = Sigmoids(name == "with batch norm", spread)
        with ProgressBar(name, rows.size) as bar:
            parts = train_in_parts(net, learning_rate, seed, train_set, rows, STEPS_PER_CALL, bar)
            histories[name] = watch(net, parts, test_set)
    draw(histories, output)
    print(sentence(*histories.values()))
    return histories


def watch(net: Sigmoids, parts: Iterable[tuple[int, State, jax.Array]], test_set: Split) -> History:
    """Measures each state of a net in training, by its running statistics."""

    @jax.jit
    def measure(state: State, test_set: Split) -> tuple[jax.Array, jax.Array]:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        images, options = test_set.images[:WATCHED], {"train": False, "mutable": ["intermediates"]}
        inputs = net.apply(variables, images, **options)[1]["intermediates"]["input"][-1]
        percentiles = jnp.percentile(inputs, jnp.array(PERCENTILES, jnp.float32), axis=0)
        return accuracy(state, test_set[:1], test_set.labels), percentiles

    accuracy = make_accuracy(net)
    steps, measured = zip(*((done, measure(state, test_set)) for done, state, _ in parts), strict=True)
    return History(np.array(steps), *map(np.stack, zip(*measured, strict=True)))


def sentence(ours: History, plain: History) -> str:
    """What the figure shows, in numbers."""
    goals, drifts, late = [], [], []
    for history in (ours, plain):
        steps = history.steps_to_goal()
        goals.append("never" if steps is None else f"after {steps:,}")
        drifts.append(np.median(drift(history.percentiles)))
        late.append(np.median(drift(history.percentiles[history.steps >= history.steps[-1] / 5])))
    return (
        f"After {ours.steps[-1]:,} steps the test accuracy is {ours.accuracy[-1]:.4f} with batch norm and"
        f" {plain.accuracy[-1]:.4f} without; {GOAL:.0%} was reached {goals[0]} and {goals[1]}; the median"
        f" input to a typical sigmoid drifted by {drifts[0]:.2f} and {drifts[1]:.2f}, and after the"
        f" first fifth of training by {late[0]:.2f} and {late[1]:.2f}."
    )


def draw(histories: dict[str, History], output: Path) -> None:
    """The paper's arrangement: accuracy, then the percentiles without and with batch norm on one scale."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    accuracy_axes, plain_axes, our_axes = figure.subplots(1, 3)
    for name, history in histories.items():
        accuracy_axes.plot(history.steps, history.accuracy, color=COLORS[name], label=name)
    accuracy_axes.set(title="(a) test accuracy", ylim=(0.7, 1.0))
    accuracy_axes.legend(frameon=False, loc="lower right", labelcolor="linecolor")
    draw_percentiles(plain_axes, histories["without"], "(b) input to a sigmoid, without")
    draw_percentiles(our_axes, histories["with batch norm"], "(c) to one with batch norm")
    our_axes.sharey(plain_axes)
    for axes in figure.axes:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    save_picture(figure, output)


def draw_percentiles(axes: Axes, history: History, title: str) -> None:
    for percent, values in zip(PERCENTILES, history.typical().T, strict=True):
        axes.plot(history.steps, values, color=INK, linewidth=1.5 if percent == 50 else 0.75)
        axes.annotate(f"{percent} %", (history.steps[-1], values[-1]), (2, 0), va="center", **LABEL)
    axes.set_title(title)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
