"""Every error says which argument of which call, what came, what was expected, how to mend it."""

import contextlib
import pickle

import pytest

import jbn
from tests import (
    test_torch_model,
    texts_convert,
    texts_convert_values,
    texts_core,
    texts_fold,
    texts_layers,
    texts_options,
    texts_report,
    texts_statistics,
    texts_tools,
)
from tests.cases import loosely

# By what they are about: the texts, and whether Flax's own layers run before the error.
TABLES = {
    "functions": (texts_core.TEXTS | texts_statistics.TEXTS, contextlib.nullcontext),
    "options": (texts_options.TEXTS, contextlib.nullcontext),
    "layers": (texts_layers.TEXTS, contextlib.nullcontext),
    "torch model": (test_torch_model.TEXTS, contextlib.nullcontext),
    "convert": (texts_convert.TEXTS, contextlib.nullcontext),
    "convert values": (texts_convert_values.TEXTS, contextlib.nullcontext),
    "report": (texts_report.TEXTS, contextlib.nullcontext),
    "fold": (texts_fold.TEXTS, loosely),
    "tools": (texts_tools.TEXTS, loosely),
}
CASES = [
    pytest.param(wrong, text, context, id=f"{table}: {name}")
    for table, (texts, context) in TABLES.items()
    for name, (wrong, text) in texts.items()
]


@pytest.mark.parametrize(("wrong", "text", "context"), CASES)
def test_error_text(wrong, text, context):
    with context(), pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        wrong()
    assert str(caught.value) == text


def test_an_unbound_axis_is_a_name_error_as_in_jax():
    with pytest.raises(NameError):
        texts_core.call(axis_name="data")


def test_errors_survive_pickling():
    """As in a pool of processes."""
    with pytest.raises(ValueError, match="nothing around the call binds") as caught:
        jbn.moments(texts_core.X, axis_name="data")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
