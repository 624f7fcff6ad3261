"""Language: which language is the name of a place in? Characters, convolutions and masks.

    python examples/language.py

Babel carries the names that Unicode's CLDR gives to countries and to the cities of time zones. Here they
are in 24 languages of the Latin script; those that several of the languages share are left out. A fifth of
the places, in all languages, is the test. The net is that of speech.py, smaller, on embedded characters,
with batch norm and without. Beside it stands a plain baseline: naive Bayes on runs of one to three
characters.

Reference: https://cldr.unicode.org, under the Unicode License; https://babel.pocoo.org.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from babel import Locale
from matplotlib.figure import Figure

from batches import check_seeds
from errors import one_line_errors
from figures import COLORS, INK, LABEL, counted, save_numbers, save_picture
from sequences import KINDS, Fcn, Sequences, accuracies, padded

# All in the Latin script, since another would give the language away. Of the closest relatives, such as Czech
# and Slovak or Swedish and Danish, there is one alone: names that languages share are left out.
LANGUAGES = (
    "cs", "cy", "de", "es", "et", "eu", "fi", "fr", "ga", "hu", "id", "is",
    "it", "lt", "lv", "nl", "pl", "pt", "ro", "sq", "sv", "sw", "tr", "vi",
)  # fmt: skip
LONGEST = 24  # longer names are left out
TEST_PART = 5  # one place in so many is for the test
BATCH_SIZE, FEATURES = 64, (64, 128, 64)
# Of 0.001, 0.003, 0.01 and 0.03 those that do best on two quarters of the names to learn from, each in turn,
# when the others are learned.
RATES = {"with": 0.03, "without": 0.01}
# To each count of naive Bayes. Of 1, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03 and 0.01 it is the one that does best on
# each quarter of the training places in turn, on average, when the other three are counted. The usual 1 is
# too much, since most runs do not occur in a language.
ADDED = 0.2


class Names(NamedTuple):
    """Names in lower case, and the number of the language of each."""

    names: list[str]
    labels: list[int]


class Net(nn.Module):
    """Embedded characters, and the net of speech.py."""

    symbols: int
    batch_norm: bool

    @nn.compact
    def __call__(self, characters: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        x = jnp.where(mask[..., jnp.newaxis], nn.Embed(self.symbols, 32)(characters), 0.0)
        return Fcn(len(LANGUAGES), self.batch_norm, FEATURES)(x, mask, train=train)


def load() -> tuple[Names, Names]:
    """Those to learn from, and those of other places for the test."""
    places, languages = {}, defaultdict(set)
    for number, code in enumerate(LANGUAGES):
        locale = Locale.parse(code)
        countries = locale.territories.items()  # continents, which are numbered, among them
        found = {name: text for name, text in countries if not name.isdigit()}
        found |= {zone: entry["city"] for zone, entry in locale.time_zones.items() if "city" in entry}
        for place, name in found.items():
            places[name.lower(), number] = place
            languages[name.lower()].add(number)
    held_out = set(sorted(set(places.values()))[::TEST_PART])
    sets = Names([], []), Names([], [])
    for (name, number), place in sorted(places.items()):
        if len(languages[name]) == 1 and len(name) <= LONGEST:
            one = sets[place in held_out]
            one.names.append(name)
            one.labels.append(number)
    return sets


def encoded(sets: tuple[Names, Names]) -> tuple[list[Sequences], int]:
    """Both as numbers of characters, and how many there are."""
    known = set().union(*(name for one in sets for name in one.names))
    number = {character: i for i, character in enumerate(sorted(known))}
    characters = ([np.array([number[one] for one in name]) for name in names] for names, _ in sets)
    found = [padded(one, names.labels, LONGEST) for one, names in zip(characters, sets, strict=True)]
    return found, len(number)


def naive_bayes(train_set: Names, test_set: Names) -> float:
    """The test accuracy of argmax over languages of sum(log p(run | language)), all counts raised."""
    counts = [Counter() for _ in LANGUAGES]
    for name, label in zip(*train_set, strict=True):
        counts[label].update(runs(name))
    known = len(set().union(*counts))
    totals = [one.total() + ADDED * known for one in counts]
    right = 0
    for name, label in zip(*test_set, strict=True):
        found = runs(name)
        scores = [
            sum(np.log((one[run] + ADDED) / total) for run in found)
            for one, total in zip(counts, totals, strict=True)
        ]
        right += int(np.argmax(scores)) == label
    return right / len(test_set.names)


def runs(name: str) -> list[str]:
    """All runs of one to three characters, with ends marked."""
    marked = f"^{name}$"
    return [marked[i : i + n] for n in (1, 2, 3) for i in range(len(marked) - n + 1)]


def main(steps: int = 1500, seeds: int = 3, output: Path = Path("runs/language.png")) -> dict[str, Any]:
    """Trains with and without batch norm, draws the test accuracies and says what they are.

    Args:
      steps: of each net.
      seeds: how many times each net is trained.
      output: where the picture goes, and beside it the numbers.

    Returns:
      The test accuracies with and without, one for each seed, and those of what does not train.
    """
    check_seeds(seeds)
    sets = load()
    (train_set, test_set), symbols = encoded(sets)
    numbers = accuracies(partial(Net, symbols), train_set, test_set, BATCH_SIZE, RATES, steps, seeds)
    numbers["naive Bayes"] = naive_bayes(*sets)
    numbers["most frequent"] = Counter(sets[1].labels).most_common()[0][1] / len(sets[1].names)
    numbers["names"] = [len(one.names) for one in sets]
    numbers = save_numbers(output, numbers, ["babel"], steps=steps, seeds=seeds)
    draw(numbers, output)
    print(sentence(numbers))
    return numbers


def sentence(numbers: Mapping[str, Any]) -> str:
    ours, plain = (
        f"{100 * np.mean(numbers[kind]):.1f} +- {100 * np.std(numbers[kind]):.1f} %" for kind in KINDS
    )
    return (
        f"Of {numbers['names'][1]:,} names the net gets {ours} right with batch norm and {plain} without,"
        f" over {counted(len(numbers['with']), 'seed')};"
        f" naive Bayes gets {100 * numbers['naive Bayes']:.1f} %."
    )


def draw(numbers: Mapping[str, Any], output: Path) -> None:
    figure = Figure(figsize=(6, 2), layout="constrained")
    axes = figure.subplots()
    bars = {
        "with batch norm": (np.mean(numbers["with"]), COLORS["with"]),
        "without": (np.mean(numbers["without"]), COLORS["without"]),
        "naive Bayes": (numbers["naive Bayes"], INK),
        "most frequent language": (numbers["most frequent"], INK),
    }
    for row, (name, (accuracy, color)) in enumerate(bars.items()):
        axes.barh(row, accuracy, color=color)
        axes.annotate(f"{name} {accuracy:.3f}", (accuracy, row), (4, 0), va="center", color=color, **LABEL)
    axes.set(title="test accuracy", xlim=(0, 1), yticks=())
    axes.invert_yaxis()
    save_picture(figure, output)


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
