"""Every error says which argument of which call, what came, what was expected, how to mend it."""

import ast
import contextlib
import functools
import pickle
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
import jbn.linen
import jbn.nnx
import jbn.tools
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
    assert len(raised(name)[0]) <= 600


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


WIDE = jbn.init(512)
TRAIN = {"use_running_average": False}
RAGGED = [[0.5] * 512, [0.5]]
MANY = {f"block{number}.conv.weight": jnp.ones(512) for number in range(400)}
MOMENTS = vars(jbn.moments(jnp.ones((8, 512), np.float32)))
HOSTILE = {
    "ragged x": lambda: jbn.batch_norm(*WIDE, RAGGED, **TRAIN),
    "ragged mask": lambda: jbn.batch_norm(*WIDE, jnp.ones((8, 512)), mask=RAGGED, **TRAIN),
    "ragged mode": lambda: jbn.batch_norm(*WIDE, jnp.ones((8, 512)), use_running_average=RAGGED),
    "collections in a tuple": lambda: jbn.batch_norm(WIDE, WIDE, jnp.ones((8, 512)), **TRAIN),
    "a list of parameters": lambda: jbn.batch_norm(
        {"scale": [1.0] * 512}, WIDE[1], jnp.ones((8, 512)), **TRAIN
    ),
    "parameters of a whole model": lambda: jbn.batch_norm(MANY, WIDE[1], jnp.ones((8, 512)), **TRAIN),
    "an axis of many": lambda: jbn.moments(jnp.ones((8, 512)), axis=list(range(900))),
    "a long name of an axis": lambda: jbn.moments(jnp.ones((8, 512)), axis_name="data" * 400),
    "unequal groups": lambda: jbn.moments(
        jnp.ones((8, 512)), axis_name="data", axis_index_groups=[list(range(400)), [400]]
    ),
    "a shape of many": lambda: jbn.init([1.5] * 400),
    "a dtype of many": lambda: jbn.batch_norm(*WIDE, jnp.ones((8, 512)), dtype=["f"] * 400, **TRAIN),
    "update by a dict": lambda: jbn.update(WIDE[1], MOMENTS),
    "merge of dicts": lambda: jbn.merge(*[MOMENTS] * 400),
    "from_torch of a whole model": lambda: jbn.tools.from_torch(MANY),
    "from_keras of a whole model": lambda: jbn.tools.from_keras(MANY),
    "from_torch_state_dict without a mapping": lambda: jbn.tools.from_torch_state_dict(MANY, {}),
    "names that are none": lambda: jbn.tools.from_torch_state_dict(dict.fromkeys(range(400)), {}),
    "a path of many": lambda: jbn.tools.from_torch_state_dict({}, {"conv": RAGGED, 3: RAGGED}),
    "a library of many": lambda: jbn.tools.settings_from(RAGGED),
    "moments of other layers": lambda: jbn.tools.apply_moments(
        {"batch_stats": WIDE[1]}, {name: jbn.Moments(**MOMENTS) for name in MANY}, momentum=0.9
    ),
    "overrides of other names": lambda: jbn.nnx.replace_batch_norm(layers.nnx_layer(), **MANY),
    "classes of many": lambda: jbn.nnx.replace_batch_norm(layers.nnx_layer(), classes=tuple(range(400))),
    "a where of many": lambda: jbn.nnx.replace_batch_norm(layers.nnx_layer(), RAGGED),
    "pairs of many": lambda: jbn.tools.fold_variables(
        {"params": {"conv": {"kernel": jnp.ones((3, 512))}}, "batch_stats": WIDE[1]}, pairs=[RAGGED[0]]
    ),
    "a class": lambda: jbn.batch_norm(*WIDE, np.float32, **TRAIN),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whole_arrays_and_lists_of_names_are_cut(name):
    """So that what was expected, and how to mend it, are seen."""
    with pytest.raises(ValueError, match=r"^jbn\..* is .*\. Expected ") as caught:
        HOSTILE[name]()
    assert len(str(caught.value)) <= 600


def test_no_public_function_is_called_inside():
    """It would name errors before that function does which the user called."""
    files = {
        file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(PACKAGE.rglob("[a-z_]*.py"))
    }
    naming = {
        (".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts), node.name)
        for file, tree in files.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and "public" in map(ast.unparse, node.decorator_list)
    }
    assert len(naming) > 25
    doors = {name for _, name in naming}
    inside = []
    for file, tree in files.items():
        module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.ImportFrom)
                and file.name != "__init__.py"
                and node.module.startswith("jbn")
            ):
                inside += [f"{module}: {each.name}" for each in node.names if each.name in doors]
            if isinstance(node, ast.Call) and (module, ast.unparse(node.func)) in naming:
                inside.append(f"{module}: {ast.unparse(node.func)}")
    assert not inside


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
