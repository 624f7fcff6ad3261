"""The gallery of examples: each runs for a few steps, and what it then says is true."""

import importlib
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import masked_sequences
import mnist_nnx
import models
import paper_figure1
from batches import take, whole_batches
from errors import UsageError
from idx import MNIST, Split, load_splits
from parallel import initial_state

pytestmark = pytest.mark.usefixtures("standard_promotion")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?%?")
TRAIN_SIZE, TEST_SIZE = 6000, 500
# What a short run of any example changes, where it has such a constant.
SMALLER = {"BATCH_SIZE": 32, "TEST_BATCH": TEST_SIZE, "MEASUREMENTS": 2, "SIZES": (2, 16, 128)}


@pytest.fixture(scope="module")
def mnist():
    """The first images of both sets."""
    train_set, test_set = load_splits(MNIST)
    return first(train_set, TRAIN_SIZE), first(test_set, TEST_SIZE)


def first(split, count):
    return Split(split.images[:count], split.labels[:count])


def learns(accuracy, steps):
    return accuracy > 0.7


def leads_and_drifts_less(steps, ours, plain, goal, drift, plain_drift, late, plain_late):
    late_is_less = late < drift and plain_late < plain_drift
    return late_is_less and ours > 0.7 and ours > plain + 0.5 and 0 < drift < plain_drift / 2


def all_learn(masked, unmasked, same_masked, same):
    return min(masked, same_masked, same) > 0.6 and 0.2 < unmasked < masked


def recalibration_helps(before, recalibrated, steps, *after):
    return before + 0.2 < recalibrated and min(after) > 0.6


def statistics_are_those_of_the_whole_batch(steps, parts, size, accuracy, whole, digit, exponent):
    return accuracy > 0.7 and whole == parts * size and digit * 10**-exponent < 1e-6


def small_batches_need_help(_, plain, shared, devices, ghost, renorm, large, *numbers):
    large_plain, _, large_ghost, large_renorm, _, size, together, _, alone = numbers
    same = large == devices * size and max(abs(together - alone), abs(large_ghost - large_plain)) < 0.01
    return same and min(alone, large_renorm) > 0.8 and max(plain, ghost) + 0.1 < renorm < shared - 0.05


@pytest.mark.parametrize(
    ("name", "steps", "true_of"),
    [
        ("functional", 100, learns),
        ("mnist_nnx", 40, learns),
        ("paper_figure1", 400, leads_and_drifts_less),
        ("masked_sequences", 80, all_learn),
        ("finetune_frozen", 40, recalibration_helps),
        ("gradient_accumulation", 60, statistics_are_those_of_the_whole_batch),
        ("small_batches", 20, small_batches_need_help),
    ],
)
def test_examples_say_what_is_true(name, steps, true_of, mnist, tmp_path, monkeypatch, capsys):
    example = importlib.import_module(name)
    monkeypatch.setattr(example, "load_splits", lambda folder: mnist)
    for constant, value in SMALLER.items():
        if hasattr(example, constant):
            monkeypatch.setattr(example, constant, value)
    monkeypatch.chdir(tmp_path)
    example.main(steps=steps)
    sentence = capsys.readouterr().out.splitlines()[-1]
    assert sentence.endswith(".")
    numbers = [float(number.replace(",", "").rstrip("%")) for number in NUMBER.findall(sentence)]
    assert true_of(*numbers), sentence
    pictures = list(tmp_path.rglob("*.png"))
    assert len(pictures) == ("output" in example.main.__annotations__)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_the_gallery_shows_every_example():
    folder = Path(models.__file__).parent
    text = (folder / "README.md").read_text()
    examples = {path.name for path in folder.glob("*.py") if "__main__" in path.read_text()}
    assert "mnist.py" in examples
    listed, pictures = (
        set(re.findall(pattern, text)) for pattern in (r"(?m)^\| \[`(.*?)`\]", r"\]\((pictures/.*?)\)")
    )
    assert listed == examples
    assert pictures == {f"pictures/{path.name}" for path in (folder / "pictures").iterdir()}


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


def test_both_nets_of_the_figure_start_from_the_same_weights():
    ours, plain = (
        initial_state(paper_figure1.Net(batch_norm, 0.03), optax.sgd(0.5), 0, np.zeros((1, 28, 28, 1))).params
        for batch_norm in (True, False)
    )
    for name, layer in plain.items():
        np.testing.assert_array_equal(layer["kernel"], ours[name]["kernel"])
        assert np.std(layer["kernel"]) == pytest.approx(0.03, rel=0.1)


def test_with_a_mask_padding_changes_nothing(mnist):
    sequences = masked_sequences.read_columns(mnist[0])
    change = {}
    for masked in (True, False):
        net = masked_sequences.Net(masked)
        first = masked_sequences.padded(sequences, np.arange(1), 20)
        state = initial_state(net, optax.sgd(0.1), 0, first.columns, first.mask)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        near, far = (
            net.apply(variables, batch.columns, batch.mask, train=True, mutable=["batch_stats"])
            for batch in (masked_sequences.padded(sequences, np.arange(16), length) for length in (20, 80))
        )
        differences = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), near, far)
        change[masked] = max(jax.tree.leaves(differences))
    assert change[True] < 1e-5 < 1e-2 < change[False]


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
