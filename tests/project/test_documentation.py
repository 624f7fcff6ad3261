"""What the documentation shows runs: docstring examples, and the Python blocks of README and docs/."""

import doctest
import importlib
import pkgutil
import re
import tomllib
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import jbn
from tests.project.test_api import DOORS, public
from tests.support.cases import loosely

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/**/*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "examples/README.md", "benchmarks/RESULTS.md")]
MODULES = [jbn.__name__, *(module.name for module in pkgutil.walk_packages(jbn.__path__, "jbn."))]


def fences(page):
    """The page's fenced blocks: what stands behind the fence, and the source, moved down to where it is."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\S[^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(block[1], "\n" * text.count("\n", 0, block.start(2)) + block[2]) for block in found]


def blocks(page, language):
    """The page's fenced blocks in that language."""
    return [source for info, source in fences(page) if info == language]


def str_of(page):
    return str(page.relative_to(ROOT))


def anchors(page):
    """Of the page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


NEEDS = re.compile(r'python title="needs (\w+)"')
WITH_ANOTHER_LIBRARY = [
    pytest.param(page, needs[1], source, id=f"{page.name}-{needs[1]}")
    for page in PAGES
    for info, source in fences(page)
    if (needs := NEEDS.fullmatch(info))
]
"""Blocks under a title such as `needs torch`: each stands by itself, and is skipped where that is missing."""


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0


@pytest.mark.usefixtures("standard_promotion")
# Orbax 0.11 warns of restoring without a target, which docs/pages/checkpoints.md shows.
@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring:UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=str_of)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for source in blocks(page, "python"):
        if page == README:  # whose blocks are pasted alone
            namespace = {"__name__": "__main__"}
        exec(compile(source, page, "exec"), namespace)


def test_the_page_on_devices_says_what_one_device_lacks(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    first, *_ = blocks(ROOT / "docs/pages/devices.md", "python")
    with pytest.raises(AssertionError, match="need 8 devices: see above"):
        exec(first, {})


@pytest.mark.parametrize(("page", "library", "source"), WITH_ANOTHER_LIBRARY)
def test_blocks_that_need_another_library_run_by_themselves(page, library, source, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.chdir(tmp_path)
    pytest.importorskip(library)
    with loosely():
        exec(compile(source, page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=str_of)
def test_no_python_block_is_left_out(page):
    for info, _ in fences(page):
        assert info in ("python", "bash") or NEEDS.fullmatch(info), info


def test_pages_show_python():
    shown = [page.name for page in PAGES if blocks(page, "python")]
    assert {"README.md", "index.md", "torch.md"} <= set(shown)
    assert len(WITH_ANOTHER_LIBRARY) == 3


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=str_of)
def test_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)#?([^)\s]*)\)", text):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=str_of)
def test_tests_that_pages_name_exist(page):
    sources = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py")}
    for name in re.findall(r"`(?:tests/)?(test_\w+(?:\.py)?)`", page.read_text(encoding="utf-8")):
        assert name in sources or any(f"def {name}(" in source for source in sources.values()), name


def test_the_differences_from_flax_are_those_that_are_tested():
    page = (ROOT / "docs/pages/migrate/flax.md").read_text(encoding="utf-8")
    tests = (ROOT / "tests/layers/test_flax_differences.py").read_text(encoding="utf-8")
    assert set(re.findall(r"`(test_\w+)` \|$", page, re.MULTILINE)) == set(
        re.findall(r"^def (test_\w+)", tests, re.MULTILINE)
    )


@pytest.mark.parametrize("door", DOORS)
def test_the_reference_has_every_public_name(door):
    page = ROOT / "docs/pages/reference" / f"{door.rpartition('.')[2]}.md"
    named = re.findall(rf"^::: {re.escape(door)}\.(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(public(importlib.import_module(door)))


def test_the_version_is_cited():
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {jbn.__version__}\n" in cited


@pytest.mark.parametrize(("position", "runs"), [(0, "examples/mnist.py"), (1, "-m pytest")])
def test_readme_commands_set_up_all_they_need(position, runs):
    command = blocks(README, "bash")[position]
    assert "python3 -m venv .venv" in command
    assert runs in command


def test_readme_is_one_page():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 140


def test_the_oldest_versions_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["examples"]]
    bounds = {line.name: str(line.specifier) for line in map(Requirement, wanted)}
    pinned = re.findall(
        r"^([\w-]+)==(\S+)$", (ROOT / ".ci/oldest.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {"jax", "jaxlib", "flax"} <= {name for name, _ in pinned}
    for name, version in pinned:
        assert Version(bounds[name].removeprefix(">=")) == Version(version), name
    start = (ROOT / "docs/pages/index.md").read_text(encoding="utf-8")
    assert f"jbn needs JAX {dict(pinned)['jax']} and Flax {dict(pinned)['flax']}, or newer." in start
