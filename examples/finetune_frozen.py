"""A net that knows MNIST learns paler digits: what becomes of the running statistics of its batch norms.

    python examples/finetune_frozen.py

The new digits are MNIST's at 40 % of their contrast, on a grey ground and with noise. There are a thousand of
them to learn from, in batches of 8. Three ways to fine-tune differ in the running statistics alone:

    frozen          those of the old digits stay, and training uses them as evaluation does
    live            training normalizes each batch by itself, and the running statistics follow
    recalibrated    measured on the thousand new digits, once and before fine-tuning, and then frozen
"""

from pathlib import Path

import jax
import numpy as np
import optax
import tyro
from chex import ArrayTree
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

import batches
import jbn.tools
import parallel
from batches import Batch
from errors import one_line_errors
from figures import COLORS, INK, save_picture
from idx import MNIST, Split, load_splits
from models import Cnn
from parallel import State, TrainStep
from progress import ProgressBar

BATCH_SIZE, SMALL_BATCH, TEST_BATCH = 128, 8, 1000
FEW = 1000  # new digits to learn from
MEASUREMENTS = 5  # of each fine-tuning, the first before it
LINES = {"frozen": INK, "live": COLORS["with"], "recalibrated": COLORS["other"]}
model = Cnn()
count_correct = parallel.count_correct(model)


def main(
    steps: int = 300, seed: int = 0, output: Path = Path("runs/finetune_frozen.png")
) -> dict[str, list[float]]:
    """Trains on the old digits, fine-tunes on the new ones in three ways, and compares.

    Args:
      steps: of training, and of each fine-tuning.
      seed: of the initial parameters, of the order of the data and of the noise.
      output: where the picture goes.

    Returns:
      Of each way the test accuracies on the new digits, the first before fine-tuning.
    """
    old, tests = load_splits(MNIST)
    rng = np.random.default_rng(seed)
    new, new_tests = changed(Split(old.images[:FEW], old.labels[:FEW]), rng), changed(tests, rng)
    earlier = learn(old, steps, seed)
    optimizer = optax.adam(0.0003)
    start = State(earlier.params, earlier.batch_stats, optimizer.init(earlier.params))
    live, frozen = parallel.jit_step(model, optimizer), frozen_step(optimizer)
    ways = {
        "frozen": (frozen, start),
        "live": (live, start),
        "recalibrated": (frozen, start._replace(batch_stats=recalibrated_stats(earlier, new))),
    }
    rows = batches.whole_batches(seed, FEW, SMALL_BATCH, steps)
    curves = {name: fine_tune(*way, new, new_tests, rows, name) for name, way in ways.items()}
    draw(curves, steps, tests, new_tests, output)
    print(f"{'':14}{'before':>8}{'after':>8}")
    for name, curve in curves.items():
        print(f"{name:14}{curve[0]:8.4f}{curve[-1]:8.4f}")
    (before, after), (_, live_after), (recalibrated, recalibrated_after) = (
        (curve[0], curve[-1]) for curve in curves.values()
    )
    print(
        f"On the new digits the accuracy is {before:.4f}, and {recalibrated:.4f} after recalibration alone;"
        f" {steps:,} steps of fine-tuning make it {after:.4f} with frozen statistics, {live_after:.4f} with"
        f" live and {recalibrated_after:.4f} with recalibrated ones."
    )
    return curves


def changed(split: Split, rng: np.random.Generator) -> Split:
    """The same digits, paler, on a grey ground and with noise."""
    images = 100 + 0.4 * split.images + rng.normal(0, 20, split.images.shape)
    return Split(images.clip(0, 255).astype(np.uint8), split.labels)


def learn(split: Split, steps: int, seed: int) -> State:
    """A net that is new, trained in the usual way."""
    optimizer = optax.adam(0.002)
    state = parallel.initial_state(model, optimizer, seed, split.images[:1])
    rows = batches.whole_batches(seed, len(split.labels), BATCH_SIZE, steps)
    return fit(parallel.jit_step(model, optimizer), state, split, rows, "the earlier net")


def recalibrated_stats(state: State, split: Split) -> ArrayTree:
    """The running statistics that the net has on these digits."""

    def apply(variables: ArrayTree, images: np.ndarray, **options):
        return model.apply(variables, images, train=True, **options)

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    parts = np.array_split(split.images, -(-len(split.images) // BATCH_SIZE))
    return jbn.tools.recalibrate(apply, variables, parts)["batch_stats"]


def frozen_step(optimizer: optax.GradientTransformation) -> TrainStep:
    """`parallel.jit_step`, but batch norm is what it is in evaluation, and keeps its statistics.

    Its scale and bias are trained, as in the other two ways. `BatchNorm(frozen=True)` holds them still too.
    """

    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        def loss(params: ArrayTree) -> jax.Array:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits = model.apply(variables, batch.images, train=False)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

        value, gradients = jax.value_and_grad(loss)(state.params)
        return parallel.updated(optimizer, state, state.batch_stats, gradients), value

    return jax.jit(step, donate_argnums=0)


def fine_tune(
    step: TrainStep, state: State, split: Split, tests: Split, rows: np.ndarray, name: str
) -> list[float]:
    """The test accuracies while it is done."""
    accuracies = [accuracy(state, tests)]
    for some in np.array_split(rows, MEASUREMENTS - 1):
        state = fit(step, state, split, some, name)
        accuracies.append(accuracy(state, tests))
    return accuracies


def fit(step: TrainStep, state: State, split: Split, rows: np.ndarray, name: str) -> State:
    """Trains on `rows` i64[steps, batch] of the data. The state that came can be used again."""
    state = jax.device_get(state)  # the step gives away what is on the device
    with ProgressBar(name, rows.size) as bar:
        for some in rows:
            state, _ = step(state, batches.take(split, some, len(some)))
            bar.update(len(some))
    return jax.device_get(state)


def accuracy(state: State, split: Split) -> float:
    """The part of the images that the net, with its running statistics, gets right."""
    count = len(split.labels)
    parts = np.split(np.arange(count), range(TEST_BATCH, count, TEST_BATCH))
    return sum(int(count_correct(state, batches.take(split, part, TEST_BATCH))) for part in parts) / count


def draw(curves: dict[str, list[float]], steps: int, old: Split, new: Split, output: Path) -> None:
    """Some digits, old above new, and beside them the errors while the net is fine-tuned."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    digits_axes, axes = figure.subplots(1, 2)
    pair = [np.hstack(split.images[:4, ..., 0]) for split in (old, new)]
    digits_axes.imshow(np.vstack(pair), cmap="gray", vmin=0, vmax=255)
    digits_axes.set(title="old digits, new digits", xticks=[], yticks=[])
    for name, curve in curves.items():
        places = np.linspace(0, steps, len(curve))
        axes.plot(places, 1 - np.array(curve), "o-", color=LINES[name], markersize=4, label=name)
    axes.set(title="test error on the new ones", xlabel="step of fine-tuning", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, labelcolor="linecolor")
    save_picture(figure, output)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
