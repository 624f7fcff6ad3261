"""Every error says which argument of which call, what came, what was expected, how to mend it."""

import pickle

import pytest

import jbn
from tests import texts_core, texts_layers

TEXTS = texts_core.TEXTS | texts_layers.TEXTS


@pytest.mark.parametrize(("wrong", "text"), TEXTS.values(), ids=TEXTS)
def test_error_text(wrong, text):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        wrong()
    assert str(caught.value) == text


def test_no_text_hides_another():
    assert len(TEXTS) == len(texts_core.TEXTS) + len(texts_layers.TEXTS)


def test_an_unbound_axis_is_a_name_error_as_in_jax():
    with pytest.raises(NameError):
        texts_core.call(axis_name="data")


def test_errors_survive_pickling():
    """As in a pool of processes."""
    with pytest.raises(ValueError, match="nothing around the call binds") as caught:
        jbn.moments(texts_core.X, axis_name="data")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
