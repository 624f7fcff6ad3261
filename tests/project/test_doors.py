"""What `jbn` and its doors show: names for help, and the doors as attributes."""

import pydoc
import subprocess
import sys

import pytest

import jbn

DOORS = ["jbn", "jbn.linen", "jbn.nnx", "jbn.tools"]


@pytest.mark.parametrize("door", DOORS)
def test_help_lists_the_public_names(door):
    module = pydoc.locate(door)
    text = pydoc.plain(pydoc.render_doc(module))
    assert module.__all__
    for name in module.__all__:
        assert name in text


def test_the_doors_open_when_they_are_asked_for():
    """And not before: `import jbn` stays without Flax, Optax and chex."""
    script = (
        "import sys, jbn\n"
        "assert not {'flax', 'optax', 'chex'} & set(sys.modules)\n"
        "print(jbn.linen.BatchNorm.__name__, jbn.nnx.BatchNorm.__name__, jbn.tools.fold.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "BatchNorm BatchNorm fold\n", done.stderr
    assert {"linen", "nnx", "tools"} <= set(dir(jbn))
    with pytest.raises(AttributeError, match="no attribute 'lines'"):
        jbn.lines  # noqa: B018
