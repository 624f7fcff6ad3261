"""Batches of 2 to 128 images: what batch norm loses in small ones, and which of its options wins it back.

    python examples/small_batches.py

One net learns MNIST four times for each size, and from the same images in the same order:

    plain           in batches of that size
    synchronised    on 8 devices with a batch of that size each, normalized together: a step is of 8 batches
    ghost           in batches of 128, of which groups of that size are normalized by themselves
    renorm          in batches of that size, corrected towards the running statistics

The learning rate of a step is proportional to its images (Goyal et al. 2017, arXiv 1706.02677), and running
statistics remember as many images whatever the size. So every run comes as far, and what differs is over how
many images batch norm measures. The devices are a mapped axis on one device, which computes the same.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from chex import ArrayTree
from matplotlib.figure import Figure

import jbn
from batches import whole_batches
from errors import one_line_errors
from figures import COLORS, INK, LABEL, save_picture
from idx import MNIST, NUM_CLASSES, Split, load_splits
from jbn.linen import BatchNorm
from models import to_unit_range
from parallel import AXIS, State, updated
from progress import ProgressBar

SIZES = (2, 4, 8, 16, 32, 64, 128)
DEVICES, LARGE, HIDDEN = 8, 128, 64
LEARNING_RATE, MOMENTUM = 0.2, 0.9  # for steps of LARGE images
LINES = {"plain": COLORS["with"], "synchronised": COLORS["other"], "ghost": INK, "renorm": "tab:green"}


class Net(nn.Module):
    """784 pixels and two hidden layers, with a batch norm each that `norm` makes."""

    norm: Callable[..., BatchNorm]

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = to_unit_range(images).reshape(images.shape[0], -1)
        for _ in range(2):
            x = nn.Dense(HIDDEN, use_bias=False)(x)
            x = nn.relu(self.norm(use_running_average=not train)(x))
        return nn.Dense(NUM_CLASSES)(x)


def main(
    steps: int = 120, seed: int = 0, output: Path = Path("runs/small_batches.png")
) -> dict[str, dict[int, float]]:
    """Trains every kind at every size, draws the test accuracies and prints them.

    Args:
      steps: of 8 times 128 images; runs with smaller steps take more of them.
      seed: of the initial weights and of the order of the data.
      output: where the picture goes.

    Returns:
      The test accuracies of each kind, by size.
    """
    train_set, test_set = load_splits(MNIST)
    rows = whole_batches(seed, len(train_set.labels), DEVICES * LARGE, steps)
    train_set, test_set = jax.device_put((train_set, test_set))
    init = jax.jit(Net(BatchNorm).init, static_argnames="train")
    variables = init(jax.random.key(seed), train_set.images[:1], train=False)
    accuracies = {kind: {} for kind in LINES}
    for kind, found in accuracies.items():
        with ProgressBar(kind, len(SIZES) * rows.size) as bar:
            for size in SIZES:
                state = train(kind, size, variables, rows, train_set)
                found[size] = float(accuracy(state, test_set))
                bar.update(rows.size)
    draw(accuracies, output)
    print(f"{'images':14}" + "".join(f"{size:8}" for size in SIZES))
    for kind, found in accuracies.items():
        print(f"{kind:14}" + "".join(f"{found[size]:8.4f}" for size in SIZES))
    print(sentence(accuracies))
    return accuracies


def train(kind: str, size: int, variables: ArrayTree, rows: np.ndarray, data: Split) -> State:
    """Trains on `rows` of the data, in as many steps as kind and size make of them, from these variables."""
    images, devices = {"synchronised": (DEVICES * size, DEVICES), "ghost": (LARGE, 1)}.get(kind, (size, 1))
    rows = rows.reshape(-1, devices, images // devices)
    share = images / LARGE
    optimizer = optax.sgd(optax.linear_schedule(LEARNING_RATE * share, 0.0, len(rows)))
    state = State(**variables, opt_state=optimizer.init(variables["params"]))

    def norm(number: jax.Array) -> Callable[..., BatchNorm]:
        options = norm_options(kind, size, number, len(rows))
        return partial(BatchNorm, momentum=MOMENTUM**share, **options)

    return make_train_steps(norm, optimizer)(state, data, rows)


def norm_options(kind: str, size: int, number: jax.Array, steps: int) -> dict[str, Any]:
    """What step `number` of `steps` gives to the batch norms; the limits are the paper's, soon reached."""
    if kind == "synchronised":
        return {"axis_name": AXIS}
    if kind == "ghost":
        return {"virtual_batch_size": size}
    if kind == "renorm":
        r_max, d_max = (optax.linear_schedule(*ends, steps // 4) for ends in ((1.0, 3.0), (0.0, 5.0)))
        return {"renorm": jbn.Renorm(r_max(number), d_max(number))}
    return {}


def make_train_steps(
    norm: Callable[[jax.Array], Callable[..., BatchNorm]], optimizer: optax.GradientTransformation
) -> Callable[[State, Split, np.ndarray], State]:
    """A function that takes all steps in one call, on `rows` i64[steps, devices, images] of the data."""

    def train_steps(state: State, data: Split, rows: np.ndarray) -> State:
        def step(state: State, numbered: tuple[jax.Array, jax.Array]) -> tuple[State, None]:
            number, rows = numbered
            net = Net(norm(number))

            def loss(params):
                variables = {"params": params, "batch_stats": state.batch_stats}
                apply = partial(net.apply, train=True, mutable=["batch_stats"])
                mapped = jax.vmap(apply, in_axes=(None, 0), axis_name=AXIS)
                logits, new = mapped(variables, data.images[rows])
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels[rows])
                return losses.mean(), jax.tree.map(lambda stats: stats[0], new["batch_stats"])

            gradients, batch_stats = jax.grad(loss, has_aux=True)(state.params)
            return updated(optimizer, state, batch_stats, gradients), None

        return jax.lax.scan(step, state, (jnp.arange(len(rows)), rows))[0]

    return jax.jit(train_steps)


@jax.jit
def accuracy(state: State, data: Split) -> jax.Array:
    """In evaluation all kinds are the same."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = Net(BatchNorm).apply(variables, data.images, train=False)
    return jnp.mean(jnp.argmax(logits, axis=-1) == data.labels)


def sentence(accuracies: Mapping[str, Mapping[int, float]]) -> str:
    """The two ends of the table, and the two of its numbers that have to agree."""
    (plain, large_plain), (shared, large_shared), (ghost, large_ghost), (renorm, large_renorm) = (
        (found[SIZES[0]], found[LARGE]) for found in accuracies.values()
    )
    part = LARGE // DEVICES
    return (
        f"With {SIZES[0]} images the test accuracy is {plain:.4f} plain, {shared:.4f} synchronised over"
        f" {DEVICES} devices, {ghost:.4f} in ghost groups and {renorm:.4f} with renorm; with {LARGE} it is"
        f" {large_plain:.4f}, {large_shared:.4f}, {large_ghost:.4f} and {large_renorm:.4f}; {DEVICES} devices"
        f" of {part} get {accuracies['synchronised'][part]:.4f}, and one of {LARGE} gets {large_plain:.4f}."
    )


def draw(accuracies: Mapping[str, Mapping[int, float]], output: Path) -> None:
    """One line per kind, with its name where it begins."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for kind, found in accuracies.items():
        axes.plot(SIZES, found.values(), "o-", color=LINES[kind], markersize=4)
        end = SIZES[0], found[SIZES[0]]
        axes.annotate(kind, end, (-8, 0), ha="right", va="center", color=LINES[kind], **LABEL)
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.7, SIZES[-1] * 1.2)
    axes.set_xticks(SIZES, SIZES)
    axes.set(title="test accuracy", xlabel="images of a batch, of each device or of each group")
    save_picture(figure, output)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
