"""The public doors: every name is documented in full, and a change of any of them shows in review.

`python -m tests.test_api` writes api.txt anew, which holds the signatures and the variables of every layer.
"""

import dataclasses
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
import jbn.tools

SNAPSHOT = Path(__file__).with_name("api.txt")
DOORS = {"jbn": jbn, "jbn.linen": jbn.linen, "jbn.nnx": jbn.nnx, "jbn.tools": jbn.tools}
LAYER_OPTIONS = ({}, {"use_scale": False, "use_bias": False}, {"momentum": None}, {"debias": True})
KINDS = (jnp.float32, jnp.complex64)


def public(module):
    """What a user may take from a door: defined in the package, and with no underscore before its name."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and (
            value.__module__.startswith(module.__name__ + ".")
            or (module is jbn and value.__module__.startswith("jbn._"))
        )
    }


NAMES = {f"{door}.{name}": value for door, module in DOORS.items() for name, value in public(module).items()}
every_name = pytest.mark.parametrize("value", NAMES.values(), ids=NAMES)


def parameters(value):
    if inspect.isclass(value) and "__init__" not in vars(value):  # that of another library
        return []
    function = value.__init__ if value is jbn.nnx.BatchNorm else value
    return [name for name in inspect.signature(function).parameters if name not in ("self", "parent", "name")]


@every_name
def test_docstrings_are_whole(value):
    text = inspect.getdoc(value)
    assert text, "no docstring"
    assert re.match(r"[^\n]+\.($|\n\n)", text), "the first paragraph is one line"
    assert ">>> " in text, "no example"
    if inspect.isfunction(value):
        assert "Returns:" in text or inspect.signature(value).return_annotation is None, (
            "no word of what comes"
        )
    for name in parameters(value):
        assert re.search(rf"^\s*\**{name}: ", text, re.MULTILINE), f"{name} is not explained"


@every_name
def test_what_can_fail_says_so(value):
    """Every function that makes an error of ours, by itself or by a check, lists ValueError."""
    if inspect.isfunction(value) and re.search(r"\berror\(|check_\w+\(", inspect.getsource(value)):
        assert "Raises:" in value.__doc__


def described():
    """The signatures of the public names and the variables of every layer, as text."""
    lines = []
    for name, value in sorted(NAMES.items()):
        kind = "class" if inspect.isclass(value) else "def"
        lines.append(f"{kind} {name}{signature(value)}")
    for title, tree in variables():
        lines += ["", title]
        lines += [f"  {path}: {leaf}" for path, leaf in tree]
    return "\n".join(lines) + "\n"


def signature(value):
    """One parameter a line; defaults by their name where their repr holds an address."""
    found = []
    for parameter in inspect.signature(value).parameters.values():
        default = parameter.default
        shown = re.sub(r"<function (\w+) at \w+>", r"\1", repr(default))
        shown = re.sub(r"<(?:object|\S+Sentinel\S*|flax\S+) .*?at \w+>", "...", shown)
        text = str(parameter.replace(default=inspect.Parameter.empty, annotation=inspect.Parameter.empty))
        found.append(text if default is inspect.Parameter.empty else f"{text}={shown}")
    return "(" + "".join(f"\n    {text}," for text in found) + "\n)"


def variables():
    """The variable tree of every layer, for the options that change it."""
    for options in LAYER_OPTIONS:
        for kind in KINDS:
            x = jnp.zeros((4, 3), kind)
            layer = jbn.linen.BatchNorm(use_running_average=False, **options)
            tree = jax.eval_shape(layer.init, jax.random.key(0), x)
            yield f"jbn.linen.BatchNorm of {kind.__name__}, {options}", shapes(tree)
        layer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
        jbn.nnx.keep_batch_moments(layer)
        yield f"jbn.nnx.BatchNorm, {options}", shapes(nnx.to_pure_dict(nnx.state(layer)))
    for count in (False, True):
        yield (
            f"jbn.init(3, count={count})",
            shapes(dict(zip(("params", "batch_stats"), jbn.init(3, count=count), strict=True))),
        )
    fields = ", ".join(field.name for field in dataclasses.fields(jbn.Moments))
    yield f"jbn.Moments: {fields}", []


def shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), f"{leaf.dtype}{list(leaf.shape)}") for path, leaf in leaves]


def test_the_api_is_that_of_the_snapshot():
    """If the change is meant: `python -m tests.test_api`, and say it in CHANGELOG.md."""
    assert described() == SNAPSHOT.read_text()


if __name__ == "__main__":
    SNAPSHOT.write_text(described())
