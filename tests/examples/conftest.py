"""Runs an example for a few steps on the first images of MNIST."""

import pytest

from idx import MNIST, Split, load_splits
from tests.support.gallery import NUMBER, TEST_SIZE, TRAIN_SIZE


@pytest.fixture(scope="module")
def mnist():
    """The first images of both sets."""
    train_set, test_set = load_splits(MNIST)
    return first(train_set, TRAIN_SIZE), first(test_set, TEST_SIZE)


def first(split, count):
    return Split(split.images[:count], split.labels[:count])


@pytest.fixture
def run(mnist, tmp_path, monkeypatch, capsys):
    """Runs an example, some of its names changed: what it returns, and the numbers of its last sentence."""

    def run(example, steps, options=None, **changes):
        if hasattr(example, "load_splits"):
            changes = {"load_splits": lambda folder: mnist, **changes}
        for name, value in changes.items():
            monkeypatch.setattr(example, name, value)
        monkeypatch.chdir(tmp_path)
        found = example.main(steps=steps, **(options or {}))
        sentence = capsys.readouterr().out.splitlines()[-1]
        assert sentence.endswith(".")
        pictures = list(tmp_path.rglob("*.png"))
        assert len(pictures) == ("output" in example.main.__annotations__)
        assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
        return found, NUMBER.findall(sentence)

    return run
