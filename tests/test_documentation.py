"""What the documentation shows runs: docstring examples, and the Python blocks of README and docs/."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import jbn

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/**/*.md"))]
MODULES = [jbn.__name__, *(module.name for module in pkgutil.walk_packages(jbn.__path__, "jbn."))]


def blocks(page, language):
    """The page's fenced blocks in that language, moved down by empty lines to where each stands in it."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in found]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for source in blocks(page, "python"):
        exec(compile(source, page, "exec"), namespace)


def test_readme_shows_python():
    assert blocks(README, "python")


@pytest.mark.parametrize(("position", "runs"), [(0, "examples/mnist.py"), (1, "-m pytest")])
def test_readme_commands_set_up_all_they_need(position, runs):
    command = blocks(README, "bash")[position]
    assert "python3 -m venv .venv" in command
    assert runs in command
