"""What the tests of the examples share: how much data there is, the numbers of a sentence, what learns."""

import re

import jax
import numpy as np
import pytest

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:%|e[-+]\d+)?")
TRAIN_SIZE, TEST_SIZE = 6000, 500


def watched(function, calls):
    """The function, which notes in a list of what it was called with and what it returned."""

    def watching(*arguments):
        result = function(*arguments)
        calls.append((arguments, jax.device_get(result)))
        return result

    return watching


def four(*numbers):
    """With four digits, as the examples print them."""
    return [f"{number:.4f}" for number in numbers]


def assert_learns(*accuracies):
    """So many of the test images, and better than chance, which is 0.1.

    With four instruction sets and five seeds these are 0.67 to 0.90, and each of them within 0.1.
    """
    for accuracy in accuracies:
        assert accuracy * TEST_SIZE == pytest.approx(round(accuracy * TEST_SIZE))
        assert 0.3 < accuracy <= 1


def difference(one, other):
    """The largest between the numbers of two trees."""
    differences = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), one, other)
    return np.max(jax.tree.leaves(differences))
