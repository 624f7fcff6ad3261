"""The public doors: every name is documented in full, and a change of any of them shows in review.

`JAX_NUM_CPU_DEVICES=8 python -m tests.project.test_api` writes tests/api.txt anew. It holds the signature of
every public function, constructor and method, the attributes of each class, and the variables of every layer.
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

SNAPSHOT = Path(__file__).parents[1] / "api.txt"
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


def maker(cls):
    """The class that defines how `cls` is made; ours, or one of another library."""
    return next(base for base in cls.__mro__ if "__init__" in vars(base))


def signature(value):
    """Of a function, or of the `__init__` of a class: a metaclass would show (*args, **kwargs)."""
    if not inspect.isclass(value):
        return inspect.signature(value)
    whole = inspect.signature(maker(value).__init__)
    return whole.replace(parameters=list(whole.parameters.values())[1:])  # without self


def parameters(value):
    if inspect.isclass(value) and maker(value) is not value:
        return []
    return [name for name in signature(value).parameters if name not in ("parent", "name")]


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
    """The public names, with what a user may write after them, and the variables of every layer."""
    lines = []
    for name, value in sorted(NAMES.items()):
        lines += described_class(name, value) if inspect.isclass(value) else [f"def {name}{shown(value)}"]
    for title, tree in variables():
        lines += ["", title]
        lines += [f"  {path}: {leaf}" for path, leaf in tree]
    return "\n".join(lines) + "\n"


def described_class(name, cls):
    """How it is made, its fields, and its own public methods and properties."""
    yield f"class {name}{shown(cls)}" if maker(cls) is cls else f"class {name}, made as {maker(cls).__name__}"
    fields = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    if public_fields := [field for field in fields if not field.startswith("_")]:
        yield f"  fields of {name}: {', '.join(public_fields)}"
    ours = [base for base in reversed(cls.__mro__) if base.__module__.partition(".")[0] == "jbn"]
    members = {member: value for base in ours for member, value in vars(base).items() if member not in fields}
    for member, value in sorted(members.items()):
        if member.startswith("_") and member != "__call__":
            continue
        if isinstance(value, property):
            yield f"property {name}.{member}"
        elif inspect.isroutine(value):  # a function, a class method or a static one
            yield f"def {name}.{member}{shown(getattr(cls, member))}"


def shown(value):
    """A signature with one parameter or marker (`*`, `/`) a line, and defaults by their name, not address.

    Without annotations: how those are written differs from version to version of Python and JAX.
    """
    given = signature(value).parameters.values()
    bare = [parameter.replace(annotation=parameter.empty, default=parameter.empty) for parameter in given]
    defaults = {
        parameter.name: f"={by_name(parameter.default)}"
        for parameter in given
        if parameter.default is not parameter.empty
    }
    words = str(inspect.Signature(bare))[1:-1].split(", ")
    return "(" + "".join(f"\n    {word}{defaults.get(word, '')}," for word in words) + "\n)"


def by_name(default):
    text = re.sub(r"<function (\w+) at \w+>", r"\1", repr(default))
    return re.sub(r"<(?:object|\S+Sentinel\S*|flax\S+) .*?at \w+>", "...", text)


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
    attributes = ", ".join(sorted(name for name in vars(layer) if not name.startswith("_")))
    yield f"jbn.nnx.BatchNorm has {attributes}", []
    for count in (False, True):
        yield (
            f"jbn.init(3, count={count})",
            shapes(dict(zip(("params", "batch_stats"), jbn.init(3, count=count), strict=True))),
        )


def shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), f"{leaf.dtype}{list(leaf.shape)}") for path, leaf in leaves]


def test_the_api_is_that_of_the_snapshot():
    """If a change is meant, write it anew, and say it in CHANGELOG.md."""
    assert described() == SNAPSHOT.read_text()


if __name__ == "__main__":
    SNAPSHOT.write_text(described())
