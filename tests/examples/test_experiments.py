"""The experiments of docs/pages/explained.md: each runs for a few steps, and measures what it says."""

import json
from functools import partial

import jax
import matplotlib.colors
import numpy as np
import pytest

import deep_gradients
import figures
import language
import learning_rates
import moving_distributions
import one_unit
import regularization
import sequences
import speech
from errors import UsageError
from models import Plain, Sigmoids
from tests.support.cases import assert_close
from tests.support.gallery import NUMBER, TEST_SIZE, TRAIN_SIZE, four, watched

pytestmark = pytest.mark.usefixtures("standard_promotion")


def assert_shares(count, accuracies):
    """Each a share of so many examples, to the digits that are kept."""
    found = np.array(accuracies) * count
    np.testing.assert_allclose(found, np.round(found), atol=0.01)
    assert np.all((found >= 0) & (found <= count))


@pytest.mark.training
def test_a_batch_of_one_unit_is_normalized_in_training(run):
    numbers, said = run(one_unit, 3)
    (mean, deviation), (seen, spread) = numbers["training"]["x"], numbers["evaluation"]["normalized"]
    shown = [f"{abs(number):.2f}" for number in (mean, deviation)]
    assert said == [*shown, "0", "1", *(f"{abs(number):.2f}" for number in (seen, spread))]
    # Epsilon makes the deviation 1 / sqrt(1 + epsilon / var).
    expected = deviation / np.sqrt(deviation**2 + 1e-5)
    assert_close(np.array(numbers["training"]["normalized"]), np.array([0.0, expected]), 1e-5)


@pytest.mark.training
def test_the_noise_says_what_was_measured(run):
    numbers, said = run(moving_distributions, 2, STEPS_PER_CALL=1, GOAL=0.0)
    without, ours, noisy = numbers.values()
    accuracies = [found["accuracies"][-1] for found in (noisy, ours, without)]
    assert_shares(TEST_SIZE, accuracies)
    moved = [f"{found['moved']:.3f}" for found in (noisy, ours, without)]
    assert said == ["0%", "0", "0", "0", "0", "0", "0", *four(*accuracies), *moved]
    assert all(found["steps"] == [0, 1, 2] for found in numbers.values())


def test_each_net_gets_its_own_numbers_in_what_is_said_of_the_noise():
    kinds = enumerate(("without", "with", "noisy"), 1)
    numbers = {
        kind: {"goal": i, "goal from larger weights": 10 * i, "accuracies": [0.0, i / 10], "moved": i / 100}
        for i, kind in kinds
    }
    said = NUMBER.findall(moving_distributions.sentence(numbers))
    goals = ["3", "2", "1", "30", "20", "10"]
    assert said == ["95%", *goals, *four(0.3, 0.2, 0.1), "0.030", "0.020", "0.010"]


def test_the_goal_is_where_it_was_first_seen_and_the_drift_that_of_a_typical_unit():
    medians = np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 9.0], [0.0, 1.0, 0.0]])
    found = moving_distributions.summary((0, 200, 400), np.array([0.9, 0.96, 0.97]), medians)
    assert found["goal"] == 200
    assert found["medians"] == [0, 2, 1]
    assert found["moved"] == 1.5  # of 1, 2, 9, 1, 1 and 9
    assert moving_distributions.summary((0,), np.array([0.9]), medians)["goal"] is None


def test_noise_has_another_mean_and_deviation_for_each_unit_and_step():
    one, other = (np.asarray(moving_distributions.noise(jax.random.key(i), (20_000, 8))) for i in range(2))
    for found in (one, other):
        assert np.all(np.abs(found.mean(0)) < 0.52)
        assert np.all(found.std(0) < 0.52)
        assert np.ptp(found.mean(0)) > 0.1
        assert np.ptp(found.std(0)) > 0.1
    assert np.max(np.abs(one.mean(0) - other.mean(0))) > 0.1


def test_noise_is_in_training_alone(mnist):
    images = mnist[0].images[:8]
    quiet, noisy = Sigmoids(True, 0.03), Sigmoids(True, 0.03, moving_distributions.disturb)
    variables = quiet.init(jax.random.key(0), images, train=False)
    np.testing.assert_array_equal(*(net.apply(variables, images, train=False) for net in (quiet, noisy)))
    options = {"train": True, "rngs": {"noise": jax.random.key(1)}, "mutable": ["batch_stats"]}
    one, other = (net.apply(variables, images, **options)[0] for net in (quiet, noisy))
    assert np.max(np.abs(one - other)) > 1e-2


def test_gradients_grow_as_theory_says():
    """Over twenty seeds the growth is 1.453, with a deviation of 0.003: the limit is 0.015 away."""
    keys = jax.random.split(jax.random.key(0), 2)
    found = {
        name: deep_gradients.growth(
            np.stack([deep_gradients.log_gradient_norms(deep_gradients.KINDS[name], key) for key in keys])
        )
        for name in ("relu, batch norm", "sigmoid")
    }
    np.testing.assert_allclose(found["relu, batch norm"], np.pi / (np.pi - 1), rtol=0.02)
    assert np.all(found["sigmoid"] < 0.1)


@pytest.mark.training
def test_deep_nets_say_what_was_measured(run):
    jax.clear_caches()  # what the test before compiled has other sizes
    sizes = {"DEPTH": 4, "SETTLED": 2, "WIDTH": 8, "ROWS": 16, "DEPTHS": (1, 2), "NARROW": 8, "HELD_OUT": 50}
    kinds = {name: deep_gradients.KINDS[name] for name in ("relu", "relu, batch norm")}
    calls, rates = [], (0.0, 0.1)
    watching = watched(deep_gradients.accuracies, calls)
    numbers, said = run(
        deep_gradients, 2, {"seeds": 2}, KINDS=kinds, RATES=rates, accuracies=watching, **sizes
    )
    found = numbers["relu, batch norm"]["growth"]
    shown = [np.mean(found), min(found), max(found)]
    assert said == [*(f"{number:.3f}" for number in shown), "2", "1.467"]
    results = iter(calls)
    for one in numbers.values():
        assert len(one["log10 norms"]) == 4
        for place in range(2):
            (_, _, splits, rows), (held_out, tested) = next(results)
            assert [len(split.labels) for split in splits] == [TRAIN_SIZE - 50, 50, TEST_SIZE]
            assert np.max(rows) < TRAIN_SIZE - 50
            assert held_out.shape == tested.shape == (2, 2)  # rates and seeds
            assert_shares(50, held_out)
            assert_shares(TEST_SIZE, tested)
            best = held_out.mean(1).argmax()
            assert one["rates"][place] == rates[best]
            assert one["accuracies"][place] == pytest.approx(tested[best].mean(), rel=1e-5)
            assert one["deviations"][place] == pytest.approx(tested[best].std(), abs=1e-5)


def test_tables_show_what_each_cell_is_named_after():
    deep = {"kind": {"growth": [1.0, 2.0], "accuracies": [0.1, 0.2, 0.3], "deviations": [0.04, 0.05, 0.06]}}
    row = deep_gradients.report(deep).splitlines()[-1]
    assert row == "| kind | 1.500 | 0.10 +- 0.04 | 0.20 +- 0.05 | 0.30 +- 0.06 |"
    few = {"kind": {"train": [1.0, 0.9], "test": [0.8, 0.6], "deviation": [0.0, 0.0]}}
    assert regularization.report(few).splitlines()[-1] == "| kind | 0.800 (+0.200) | 0.600 (+0.300) |"
    one = {"training": {"x": [1.0, 2.0], "normalized": [0.0, 1.0], "y": [3.0, 4.0]}}
    assert one_unit.report(one).splitlines()[-1] == "| training | 1.00, 2.00 | 0.00, 1.00 | 3.00, 4.00 |"


def test_layers_in_a_loop_are_the_layers_one_by_one():
    kind = deep_gradients.KINDS["relu, batch norm, skip"]
    net = deep_gradients.layers(kind, 3, 8, train=True)
    x = jax.random.normal(jax.random.key(1), (16, 8))
    variables = net.init(jax.random.key(0), x)
    (found, _), _ = net.apply(variables, x, mutable=["batch_stats"])
    x = np.asarray(x, np.float64)
    for w in np.asarray(variables["params"]["Dense_0"]["kernel"], np.float64):
        y = x @ w
        x = x + np.maximum(0, (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5))
    assert_close(found, x, 1e-5)


@pytest.mark.training
def test_learning_rates_say_what_was_measured(run):
    rates = (0.01, 0.1, 1.0)
    numbers, said = run(learning_rates, 20, RATES=rates)
    assert numbers["rates"] == list(rates)
    ours, plain = np.array(numbers["with"]), np.array(numbers["without"])
    best = [rates[found.argmax()] for found in (ours, plain)]
    largest = [
        max((r for r, a in zip(rates, found, strict=True) if a > 0.5), default=0) for found in (ours, plain)
    ]
    expected = [ours.max(), best[0], plain.max(), best[1], 0.01, ours[0], plain[0], *largest]
    assert [float(number) for number in said] == pytest.approx(expected, abs=1e-4)
    assert_shares(TEST_SIZE, [ours, plain])


@pytest.mark.training
def test_regularization_says_what_was_measured(run):
    kinds = {name: regularization.KINDS[name] for name in ("without", "with both")}
    calls = []
    watching = watched(regularization.run, calls)
    numbers, said = run(regularization, 2, {"seeds": 2}, FEW=16, SIZES=(4,), KINDS=kinds, run=watching)
    trained, tested = np.array([accuracies for _, accuracies in calls], np.float64).swapaxes(0, 1)
    assert trained.shape == tested.shape == (2, 2)  # kinds and seeds
    spread = np.abs(tested[:, 0] - tested[:, 1]) / 2
    assert said == [f"{np.min(trained.sum(1) / 2):.3f}", f"{np.max(spread):.3f}"]
    for found in numbers.values():
        assert_shares(16 * 2, found["train"])
        assert_shares(TEST_SIZE * 2, found["test"])


def test_dropout_and_batch_norm_are_in_the_net_that_asks_for_them(mnist):
    images = mnist[0].images[:8]
    for batch_norm, dropout in regularization.KINDS.values():
        net = Plain(2, 16, batch_norm, dropout)
        variables = net.init(jax.random.key(0), images, train=False)
        assert ("batch_stats" in variables) == batch_norm
        options = {"train": True, "mutable": ["batch_stats"]}
        one, other = (
            net.apply(variables, images, rngs={"noise": jax.random.key(i)}, **options)[0] for i in range(2)
        )
        assert np.array_equal(one, other) == (dropout == 0)


def test_the_utterances_are_those_of_the_paper():
    train_set, test_set = speech.load("TRAIN"), speech.load("TEST")
    assert np.bincount(train_set.labels).tolist() == [30] * 9
    assert np.bincount(test_set.labels).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    for one, longest in ((train_set, 26), (test_set, 29)):
        assert one.values.shape == (len(one.labels), 29, 12)
        lengths = one.mask.sum(1)
        assert (lengths.min(), lengths.max()) == (7, longest)
        assert not np.any(one.values[~one.mask])
    np.testing.assert_allclose(train_set.values[0, :3, 0], [1.860936, 1.891651, 1.939205])


def test_padding_changes_nothing(x64):
    """Neither the logits nor the statistics of the convolutional net."""
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(length, 3)) for length in (4, 7, 5)]
    net = sequences.Fcn(2, True, (4, 6, 4))
    found = []
    for length in (7, 12):
        batch = sequences.padded(values, [0, 1, 0], length)
        variables = net.init(jax.random.key(0), batch.values, batch.mask, train=False)
        found.append(net.apply(variables, batch.values, batch.mask, train=True, mutable=["batch_stats"]))
    (one, stats), (other, other_stats) = found
    assert_close(one, other, 1e-6)
    jax.tree.map(lambda *both: assert_close(*both, 1e-6), stats, other_stats)


@pytest.mark.training
@pytest.mark.parametrize("example", [speech, language])
def test_sequences_say_what_was_measured(example, run):
    few = (4, 4, 4)
    small = {"Fcn": partial(sequences.Fcn, features=few)} if example is speech else {"FEATURES": few}
    numbers, said = run(example, 2, {"seeds": 2}, **small)
    ours, plain = (np.array(numbers[kind]) for kind in ("with", "without"))
    expected = [f"{100 * value:.1f}" for one in (ours, plain) for value in (one.mean(), one.std())]
    if example is speech:
        assert said == ["2", *expected]
        assert_shares(370, [ours, plain])
    else:
        count = numbers["names"][1]
        assert said == [f"{count:,}", *expected, "2", f"{100 * numbers['naive Bayes']:.1f}"]
        assert_shares(count, [ours, plain])


def test_no_place_and_no_name_is_in_both_sets():
    train_set, test_set = language.load()
    assert min(len(train_set.names), 4 * len(test_set.names)) > 2000
    assert not set(train_set.names) & set(test_set.names)
    for names, labels in (train_set, test_set):
        assert len(set(names)) == len(names) == len(labels)
        assert max(map(len, names)) <= language.LONGEST
    labels = dict(zip(train_set.names + test_set.names, train_set.labels + test_set.labels, strict=True))
    assert "berlin" not in labels
    for place in (("frankreich", "ranska", "prancis"), ("deutschland", "saksa", "jerman")):
        assert [language.LANGUAGES[labels[name]] for name in place] == ["de", "fi", "id"]
        assert len({name in train_set.names for name in place}) == 1


def test_naive_bayes_counts_runs_of_characters(monkeypatch):
    monkeypatch.setattr(language, "LANGUAGES", ("one", "other"))
    assert language.runs("ab") == ["^", "a", "b", "$", "^a", "ab", "b$", "^ab", "ab$"]
    train_set = language.Names(["ab", "ac", "ad", "ae", "a"], [0, 0, 0, 0, 1])
    # The first language has more of each run, and less of them for what it has in all.
    assert language.naive_bayes(train_set, language.Names(["a", "b", "c"], [1, 0, 1])) == 2 / 3
    # The second has what the first lacks, but more runs in all: with 1 added, the first would be chosen.
    few = language.Names(["x", "xy", "q"], [0, 1, 1])
    assert language.naive_bayes(few, language.Names(["xyy"], [1])) == 1


@pytest.mark.parametrize("example", [deep_gradients, regularization, speech, language])
def test_no_seed_at_all_is_a_mistake(example):
    with pytest.raises(UsageError, match="--seeds 0: expected 1 or more"):
        example.main(seeds=0)


def test_more_images_than_there_are_is_a_mistake():
    with pytest.raises(UsageError, match="--seeds 235: expected 234 or fewer"):
        regularization.main(seeds=235)


def luminance(color):
    """As the guidelines for accessible pages define it."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(color)
    ]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


@pytest.mark.parametrize("page", ["#ffffff", "#1e2129"])  # of the site: light and dark
@pytest.mark.parametrize("color", [figures.INK, *figures.COLORS.values()])
def test_pictures_can_be_read_on_light_and_on_dark_pages(color, page):
    low, high = sorted([luminance(color), luminance(page)])
    assert (high + 0.05) / (low + 0.05) >= 3


@pytest.mark.parametrize("name", ["one", "one.svg", "one.json"])
def test_a_picture_is_a_png_whatever_its_path_ends_with(name, tmp_path):
    figures.save_picture(figures.Figure(), tmp_path / "new" / name)
    assert (tmp_path / "new" / "one.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_are_kept_with_settings_and_versions(tmp_path):
    numbers = figures.save_numbers(tmp_path / "one.png", {"a": [1 / 3, 2], "b": {"c": None}}, seed=3)
    assert numbers == {"a": [0.333333, 2], "b": {"c": None}}
    content = json.loads((tmp_path / "one.json").read_text())
    assert content["numbers"] == numbers
    assert content["settings"] == {"seed": 3}
    assert {"python", "jbn", "jax"} <= set(content["versions"])
