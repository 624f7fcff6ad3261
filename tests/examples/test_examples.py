"""The gallery of examples: each runs for a few steps, and says what it measured."""

import itertools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import finetune_frozen
import functional
import gradient_accumulation
import masked_sequences
import mnist_nnx
import models
import paper_figure1
import parallel
import small_batches
import training
from batches import take, whole_batches
from errors import UsageError
from tests.support.cases import assert_close, assert_trees_close
from tests.support.gallery import assert_learns, difference, four, watched

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.training
def test_a_net_of_the_pure_function_learns(run):
    accuracy, said = run(functional, 50)
    assert said == [*four(accuracy), "50"]
    assert_learns(accuracy)


@pytest.mark.training
def test_a_net_of_nnx_learns(run):
    accuracy, said = run(mnist_nnx, 20, BATCH_SIZE=64, TEST_BATCH=300)
    assert said == [*four(accuracy), "20"]
    assert_learns(accuracy)


@pytest.mark.training
def test_the_figure_says_what_was_measured_of_nets_with_the_same_first_weights(run, monkeypatch):
    starts = []
    monkeypatch.setattr(training, "initial_state", watched(training.initial_state, starts))
    histories, said = run(paper_figure1, 400, GOAL=0.5)
    goals, drifts, late = [], [], []
    for history in histories.values():
        np.testing.assert_array_equal(history.steps, [0, 200, 400])
        goals += [str(step) for step in history.steps[history.accuracy >= 0.5][:1]]
        medians = history.percentiles[:, 1]
        drifts.append(f"{np.median(np.ptp(medians, axis=0)):.2f}")
        late.append(f"{np.median(np.ptp(medians[1:], axis=0)):.2f}")
    ours, plain = (history.accuracy[-1] for history in histories.values())
    assert said == ["400", *four(ours, plain), "50%", *goals, *drifts, *late]
    assert_learns(ours)
    (_, our_start), (_, plain_start) = starts
    for name, layer in plain_start.params.items():
        np.testing.assert_array_equal(layer["kernel"], our_start.params[name]["kernel"])
        assert np.std(layer["kernel"]) == pytest.approx(0.03, rel=0.1)


@pytest.mark.training
def test_with_a_mask_padding_changes_nothing_that_is_learned(run):
    calls = []

    def make_count_correct(net, make=masked_sequences.make_count_correct):
        return watched(make(net), calls)

    found, said = run(masked_sequences, 40, BATCH_SIZE=64, make_count_correct=make_count_correct)
    same, different = found.values()
    assert said == four(*different, *same)
    assert_learns(*same, *different)
    ends = [jax.device_get(state) for (state, _), _ in calls]
    assert difference(*ends[:2]) < 1e-4  # with four instruction sets and five seeds: 2e-7 to 2e-6
    assert difference(*ends[2:]) > 1e-1  # 0.9 to 1.5


@pytest.mark.training
def test_ways_to_fine_tune_differ_in_the_running_statistics_alone(run):
    """On a small net, which compiles in less time."""
    calls, net = [], models.Mlp()
    sizes = {"BATCH_SIZE": 64, "TEST_BATCH": 300, "FEW": 512, "MEASUREMENTS": 2}
    parts = {
        "model": net,
        "count_correct": parallel.count_correct(net),
        "fit": watched(finetune_frozen.fit, calls),
    }
    curves, said = run(finetune_frozen, 20, **sizes, **parts)
    (before, after), (live_before, live_after), (recalibrated, recalibrated_after) = curves.values()
    assert said == [*four(before, recalibrated), "20", *four(after, live_after, recalibrated_after)]
    assert live_before == before
    starts, ends, digits = {}, {}, {}
    for (_, start, split, _, name), end in calls:
        starts[name], ends[name], digits[name] = start, end, split.images
    earlier = ends["the earlier net"]
    for name in ("frozen", "live", "recalibrated"):
        assert difference(starts[name].params, earlier.params) == 0
        assert difference(ends[name].params, earlier.params) > 1e-3  # 20 steps of Adam move by 0.005
        moved = difference(ends[name].batch_stats, starts[name].batch_stats)
        assert moved > 1e-3 if name == "live" else moved == 0
    assert difference(starts["live"].batch_stats, earlier.batch_stats) == 0
    assert difference(starts["frozen"].batch_stats, earlier.batch_stats) == 0
    pixels = digits["recalibrated"].reshape(512, -1) / 255
    x = pixels @ earlier.params["Dense_0"]["kernel"].astype(np.float64)
    stats = starts["recalibrated"].batch_stats["BatchNorm_0"]
    assert_close(stats["mean"], x.mean(0), 1e-5)
    assert_close(stats["var"], x.var(0), 1e-5)


@pytest.mark.training
def test_accumulated_statistics_are_those_of_whole_batches(run):
    (accuracy, apart), said = run(gradient_accumulation, 20, BATCH_SIZE=64)
    assert said == ["20", "8", "8", *four(accuracy), "64", f"{apart:.0e}"]
    assert_learns(accuracy)
    assert apart < 1e-6  # at most 2e-7 with four instruction sets and five seeds


@pytest.mark.training
def test_kinds_that_measure_the_same_images_learn_the_same(run):
    calls = []
    found, said = run(small_batches, 1, SIZES=(2, 16), LARGE=16, train=watched(small_batches.train, calls))
    small, large = ([found[kind][size] for kind in small_batches.LINES] for size in (2, 16))
    ends_of_the_table = ["2", *four(*small[:2]), "8", *four(*small[2:]), "16", *four(*large)]
    assert said == [*ends_of_the_table, "8", "2", *four(small[1]), "16", *four(large[0])]
    ends = {(kind, size): state for (kind, size, *_), state in calls}
    whole = ends["plain", 16]
    # 8 steps from the same weights. With four instruction sets and five seeds they end at most 4e-7 apart ...
    for same in (("synchronised", 2), ("ghost", 16)):
        assert_trees_close(ends[same], whole, 1e-5)
    # ... and what measures other images 0.17 or more, at least in one of the weights.
    for one, other in itertools.combinations(small_batches.LINES, 2):
        assert difference(ends[one, 2].params, ends[other, 2].params) > 1e-2


def test_the_gallery_shows_every_example():
    folder = Path(models.__file__).parent
    text = (folder / "README.md").read_text()
    page = (folder.parent / "docs/pages/explained.md").read_text()
    examples = {path.name for path in folder.glob("*.py") if "__main__" in path.read_text()}
    assert "mnist.py" in examples
    assert set(re.findall(r"(?m)^\| \[`(.*?)`\]", text)) == examples
    shown = set(re.findall(r"!\[[^]]*\]\(.*?pictures/(.*?)\)", text + page))
    assert shown == {path.name for path in (folder / "pictures").glob("*.png")}


def test_whole_batches_go_through_the_data_epoch_by_epoch():
    rows = whole_batches(3, 10, 4, 5)  # 2 steps an epoch
    assert rows.shape == (5, 4)
    for epoch in (rows[:2], rows[2:4]):
        assert len(np.unique(epoch)) == 8
    assert not np.array_equal(rows[:2], rows[2:4])
    np.testing.assert_array_equal(rows[:3], whole_batches(3, 10, 4, 3))


@pytest.mark.parametrize("changes", [{"steps": 0}, {"seed": -1}])
def test_an_option_out_of_range_is_named(changes):
    options = {"seed": 0, "count": 10, "size": 4, "steps": 1} | changes
    ((name, value),) = changes.items()
    with pytest.raises(UsageError, match=f"--{name} {value}: expected"):
        whole_batches(**options)


def test_sequences_hold_the_columns_with_ink(mnist):
    images = mnist[0].images
    sequences = masked_sequences.read_columns(mnist[0])
    for row in range(50):
        image, columns, length = images[row, ..., 0], sequences.columns[row], sequences.lengths[row]
        inked = np.flatnonzero(image.any(axis=0))
        np.testing.assert_array_equal(columns[:length], image[:, inked[0] : inked[-1] + 1].T)
        assert not columns[length:].any()


def test_the_nnx_net_is_that_of_mnist_py(mnist):
    batch = take(mnist[0], np.arange(8), 8)
    linen, ours = models.Cnn(), mnist_nnx.Cnn(28, rngs=nnx.Rngs(0))
    variables = linen.init(jax.random.key(0), batch.images, train=False)
    layers = {"Dense_0": ours.hidden, "BatchNorm_3": ours.hidden_norm, "Dense_1": ours.logits}
    for i in range(3):
        layers |= {f"Conv_{i}": ours.convolutions[i], f"BatchNorm_{i}": ours.norms[i]}
    assert set(layers) == set(variables["params"])
    for name, layer in layers.items():
        for leaf, value in variables["params"][name].items():
            assert getattr(layer, leaf).shape == value.shape
            getattr(layer, leaf).set_value(value)
    expected, new = linen.apply(variables, batch.images, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(ours(batch.images), expected, rtol=1e-4, atol=1e-5)
    for name, stats in new["batch_stats"].items():
        np.testing.assert_allclose(layers[name].mean[...], stats["mean"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(layers[name].var[...], stats["var"], rtol=1e-4, atol=1e-6)
