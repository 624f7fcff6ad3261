"""Every error says which argument of which call, what came, what was expected, how to mend it."""

import ast
import contextlib
import functools
import pickle
import traceback
from pathlib import Path

import jax
import pytest

import jbn.linen
from tests.error_texts import convert, convert_values, core, fold, layers, options, report, statistics, tools
from tests.support.cases import loosely
from tests.tools.convert import test_torch_model

# By what they are about: the texts, and whether Flax's own layers run before the error.
TABLES = {
    "functions": (core.TEXTS | statistics.TEXTS, contextlib.nullcontext),
    "options": (options.TEXTS, contextlib.nullcontext),
    "layers": (layers.TEXTS, contextlib.nullcontext),
    "torch model": (test_torch_model.TEXTS, contextlib.nullcontext),
    "convert": (convert.TEXTS, contextlib.nullcontext),
    "convert values": (convert_values.TEXTS, contextlib.nullcontext),
    "report": (report.TEXTS, contextlib.nullcontext),
    "fold": (fold.TEXTS, loosely),
    "tools": (tools.TEXTS, loosely),
}
CASES = {
    f"{table}: {name}": (wrong, text, context)
    for table, (texts, context) in TABLES.items()
    for name, (wrong, text) in texts.items()
}
PACKAGE = Path(jbn.__file__).parent


@functools.cache  # some take a while, and test_every_error_has_a_text needs all of them
def raised(name):
    """The text of a case's error, and the lines of the package that had a part in it."""
    wrong, _, context = CASES[name]
    with context(), pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        wrong()
    return str(caught.value), frozenset(lines(caught.value))


def lines(error):
    """File and line of every frame that the error passed, and of those that it took the place of."""
    while error is not None:
        for frame, line in traceback.walk_tb(error.__traceback__):
            yield frame.f_code.co_filename, line
        error = error.__context__


@pytest.mark.parametrize("name", CASES)
def test_error_text(name):
    assert raised(name)[0] == CASES[name][1]


def test_every_error_has_a_text():
    """Of every `error(...)` in the package, some case above shows what it says."""
    reached = set().union(*(raised(name)[1] for name in CASES))
    unseen = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "error":
                spot = {(str(file), line) for line in range(node.lineno, node.end_lineno + 1)}
                unseen += [] if spot & reached else [f"{file.relative_to(PACKAGE)}:{node.lineno}"]
    assert not unseen


def test_an_unbound_axis_is_a_name_error_as_in_jax():
    with pytest.raises(NameError):
        core.call(axis_name="data")


def test_errors_survive_pickling():
    """As in a pool of processes."""
    with pytest.raises(ValueError, match="nothing around the call binds") as caught:
        jbn.moments(core.X, axis_name="data")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_error_keeps_the_name_of_the_function_where_it_came_from():
    """A function of the user's own, inside of a layer."""
    layer = jbn.linen.BatchNorm(use_running_average=False, scale_init=lambda *_: jbn.merge())
    with pytest.raises(ValueError, match=r"^jbn\.merge: moments is \(\)\."):
        layer.init(jax.random.key(0), core.X)
