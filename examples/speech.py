"""Speech: which of nine men says two vowels? A convolutional net with masks, with batch norm and without.

    python examples/speech.py

Each utterance of the Japanese Vowels is a sequence of 7 to 29 steps of 12 coefficients; 270 are to learn
from. The net is the fully convolutional one of Wang et al. It learns by Adam, at a rate that falls from 0.001
to 0, in batches of 16 padded to 29.

References: Kudo, Toyama and Shimbo 1999, Pattern Recognition Letters 20; Fawaz et al. 2019, arXiv 1809.04356.
"""

import gzip
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from batches import check_seeds
from errors import one_line_errors
from figures import COLORS, INK, counted, save_numbers, save_picture
from sequences import KINDS, Fcn, Sequences, accuracies, padded

VOWELS = Path(__file__).parent / "data" / "vowels"
LONGEST, SPEAKERS = 29, 9
BATCH_SIZE = 16
# Of 0.0003, 0.001, 0.003 and 0.01 those that do best on quarters of the utterances to learn from, each in
# turn, when the others are learned.
RATES = {"with": 0.001, "without": 0.001}
# By Fawaz et al.: mean and standard deviation over ten runs.
REPORTED = {"MLP": (0.976, 0.002), "ResNet": (0.992, 0.003), "FCN": (0.993, 0.002)}


def load(name: str) -> Sequences:
    """The utterances of TRAIN or of TEST: on each line series, separated by colons, and the speaker."""
    with gzip.open(VOWELS / f"JapaneseVowels_{name}.ts.gz", "rt") as file:
        lines = file.read().partition("@data\n")[2].splitlines()
    parts = [line.split(":") for line in lines]
    values = [np.array([one.split(",") for one in series], np.float32).T for *series, _ in parts]
    return padded(values, [int(speaker) - 1 for *_, speaker in parts], LONGEST)


def standardized(train_set: Sequences, test_set: Sequences) -> tuple[Sequences, Sequences]:
    """Both, so that each coefficient has mean 0 and variance 1 over all steps that are to learn from.

    Else batch norm would be the only one to have its input so.
    """
    real = train_set.values[train_set.mask]
    mean, deviation = real.mean(0), real.std(0)

    def scaled(one: Sequences) -> Sequences:
        values = np.where(one.mask[..., np.newaxis], (one.values - mean) / deviation, 0.0)
        return one._replace(values=values.astype(np.float32))

    return scaled(train_set), scaled(test_set)


def main(steps: int = 400, seeds: int = 10, output: Path = Path("runs/speech.png")) -> dict[str, list[float]]:
    """Trains with and without batch norm, draws the test accuracies and says what they are.

    Args:
      steps: of each net.
      seeds: how many times each net is trained.
      output: where the picture goes, and beside it the numbers.

    Returns:
      The test accuracies with and without, one for each seed.
    """
    check_seeds(seeds)
    sets = standardized(load("TRAIN"), load("TEST"))
    numbers = accuracies(partial(Fcn, SPEAKERS), *sets, BATCH_SIZE, RATES, steps, seeds)
    numbers = save_numbers(output, numbers, steps=steps, seeds=seeds)
    draw(numbers, output)
    print(sentence(numbers))
    return numbers


def sentence(numbers: Mapping[str, list[float]]) -> str:
    (ours, spread), (plain, plain_spread) = (
        (100 * np.mean(found), 100 * np.std(found)) for found in numbers.values()
    )
    return (
        f"Over {counted(len(numbers['with']), 'seed')} the test accuracy is {ours:.1f} +- {spread:.1f} % with"
        f" batch norm and {plain:.1f} +- {plain_spread:.1f} % without."
    )


def draw(numbers: Mapping[str, list[float]], output: Path) -> None:
    """A dot for each seed; beside them what others report, with a standard deviation to each side."""
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    axes = figure.subplots()
    shift = np.random.default_rng(0)
    for row, kind in enumerate(KINDS):
        found = np.array(numbers[kind])
        axes.plot(found, row + shift.uniform(-0.2, 0.2, len(found)), "o", color=COLORS[kind], markersize=4)
        axes.plot([found.mean()] * 2, [row - 0.35, row + 0.35], color=COLORS[kind])
    for row, (mean, deviation) in enumerate(REPORTED.values(), len(KINDS)):
        axes.errorbar(mean, row, xerr=deviation, fmt="o", color=INK, markersize=4)
    names = ["with batch norm", "without", *(f"{name}, reported" for name in REPORTED)]
    axes.set_yticks(range(len(names)), names)
    axes.set_title("test accuracy")
    save_picture(figure, output)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
