"""docs/pages/explained.md and the runs behind it say the same: each number on the page comes from a file."""

import importlib
import json
import math
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/pages/explained.md"
PICTURES = ROOT / "examples/pictures"
EXPERIMENTS = (
    "one_unit",
    "moving_distributions",
    "deep_gradients",
    "learning_rates",
    "regularization",
    "speech",
    "language",
)
# What others report, and settings. Everything else with a decimal point or a percent sign is measured.
GIVEN = {
    '"Each unit\'s input keeps its distribution"': {"0.5", "0.03", "0.1"},
    '"It solves vanishing and exploding gradients"': {"0.001"},
    '"Vision, language, speech"': {"99.3", "99.2", "97.6", "0.2", "0.3", "4.0"},
}
COST = "## cost"
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"


def plain(text):
    """Without the marks and the line breaks of a quotation."""
    return re.sub(r"\s+", " ", re.sub(r"(?m)^> ?", "", text))


def said(name):
    """What the example says of the numbers that are kept beside its picture."""
    example = importlib.import_module(name)
    numbers = json.loads((PICTURES / f"{name}.json").read_text())["numbers"]
    tables = [example.report(numbers)] if hasattr(example, "report") else []
    return [example.sentence(numbers), *tables]


def cost():
    """The table of what batch norm costs, in the results of the benchmarks, and the share that follows."""
    section = (ROOT / "benchmarks/RESULTS.md").read_text().partition(f"\n{COST}\n")[2].partition("\n## ")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    ours, bias = (float(row) for row in re.findall(r"(?m)^\| [a-z].*? \| ([\d.]+) \(", table))
    return [table, f"{1 - bias / ours:.0%}".replace("%", " %")]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_page_shows_what_was_measured(name):
    page = PAGE.read_text()
    for target in (f"pictures/{name}.png", f"{name}.py", f"pictures/{name}.json"):
        assert f"](../../examples/{target})" in page
    for text in said(name):
        assert plain(text) in plain(page)


def test_the_page_shows_what_the_benchmarks_counted():
    for text in cost():
        assert plain(text) in plain(PAGE.read_text())


def test_every_number_on_the_page_comes_from_a_file():
    measured = [*(text for name in EXPERIMENTS for text in said(name)), *cost()]
    page = re.sub(r"(?ms)^```.*?^```$|\]\(.*?\)", "", PAGE.read_text())
    left = {}
    for section in page.split("\n## "):
        text = plain(section)
        for one in measured:
            text = text.replace(plain(one), "")
        left[section.partition("\n")[0]] = set(re.findall(r"\d[\d,]*\.\d+|\d+(?= ?%)", text))
    assert {head: numbers for head, numbers in left.items() if numbers} == GIVEN


def test_numbers_in_words_follow_from_the_files():
    page = plain(PAGE.read_text())
    rates, language = (
        json.loads((PICTURES / f"{name}.json").read_text())["numbers"]
        for name in ("learning_rates", "language")
    )
    largest = (
        max(rate for rate, accuracy in zip(rates["rates"], rates[kind], strict=True) if accuracy > 0.5)
        for kind in ("with", "without")
    )
    assert round(math.log10(next(largest) / next(largest)), 1) == 1.5  # which is a factor of 32
    assert "up to thirty times as large" in page
    gain = 100 * (statistics.mean(language["with"]) - statistics.mean(language["without"]))
    assert f"helps this net by {gain:.0f} points" in page
    assert f"{language['names'][0]:,} names are few" in page


def test_what_others_report_is_on_the_page_as_in_the_picture():
    page = plain(PAGE.read_text())
    for name, before, after in (
        ("FCN", "report ", " % for theirs"),
        ("ResNet", "", " % for a ResNet"),
        ("MLP", "", " % for an MLP"),
    ):
        mean, deviation = importlib.import_module("speech").REPORTED[name]
        assert f"{before}{100 * mean:.1f} +- {100 * deviation:.1f}{after}" in page


def test_every_number_of_the_gallery_comes_from_a_file():
    """Those of what is on the page; a depth and the images of a training set are no results."""
    gallery = (ROOT / "examples/README.md").read_text()
    for name in EXPERIMENTS:
        example = importlib.import_module(name)
        row = re.search(rf"(?m)^\| \[`{name}.py`\]\(.*?\) \| (.*) \|$", gallery)[1]
        settings = {str(getattr(example, setting, None)) for setting in ("DEPTH", "FEW")}
        known = set(re.findall(NUMBER, " ".join(said(name)))) | settings
        assert set(re.findall(NUMBER, row)) <= known


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_numbers_say_how_they_came_about(name):
    content = json.loads((PICTURES / f"{name}.json").read_text())
    assert {"steps"} < set(content["settings"]) <= {"steps", "seed", "seeds"}
    assert {"python", "jbn", "jax", "flax"} <= set(content["versions"])
