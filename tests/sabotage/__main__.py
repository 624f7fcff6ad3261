"""Breaks the package in named ways, one at a time, and shows that the tests find each.

    python -m tests.sabotage [NAME ...]    all of them if none is named; with the tests that should be red

A breakage replaces one text of one file in a copy of the repository. Those that no test finds are listed in
the end, and the exit status is 1.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.sabotage.breakages import BREAKS

ROOT = Path(__file__).parents[2]


def broken(text: str, name: str) -> str:
    """The text of a file with this breakage; its place has to be there, once."""
    found = text.count(BREAKS[name].old)
    if found != 1:
        raise ValueError(f"{name}: {BREAKS[name].file} has its text {found} times")
    return text.replace(BREAKS[name].old, BREAKS[name].new)


def is_found(name: str, copy: Path) -> bool:
    """Whether a test is red. One that cannot be collected, an exit status above 1, shows nothing."""
    file = copy / BREAKS[name].file
    text = file.read_text(encoding="utf-8")
    file.write_text(broken(text, name), encoding="utf-8")
    options = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", BREAKS[name].tests]
    try:
        result = subprocess.run(
            [sys.executable, *options],
            cwd=copy,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(copy)},
            check=False,
        )
    finally:
        file.write_text(text, encoding="utf-8")
    if result.returncode > 1:
        raise RuntimeError(result.stdout + result.stderr)
    return result.returncode == 1


def main(names: list[str]) -> int:
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "dist", "__pycache__"))
        for name in names or BREAKS:
            start = time.perf_counter()
            found = is_found(name, copy)
            print(
                f"{'found ' if found else 'MISSED'} {time.perf_counter() - start:4.0f} s  {name}", flush=True
            )
            missed += [] if found else [name]
    print(f"{len(missed)} of {len(names or BREAKS)} were missed{': ' if missed else ''}{'; '.join(missed)}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
