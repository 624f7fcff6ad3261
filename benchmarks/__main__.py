"""python -m benchmarks [TABLE ...] [--quick] [--save] [--layers NAME ...]

Prints jbn side by side with Flax, NNX, Haiku, Equinox and PyTorch, whichever are installed. What needs a
plugin that is not there says so and is left out. With --save, the sections of benchmarks/RESULTS.md are
replaced by what was measured.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time

import jbn
from benchmarks import tables
from benchmarks.contestants import LAYERS
from benchmarks.processes import CPU, JOBS, TIMED, Failed, apart

PARTS = {
    "traffic": "passes and peak memory of one layer, compiled ahead of time for an H100 and a TPU v5e",
    "resnet50": "gigabytes and peak memory of a ResNet-50 step, compiled ahead of time for the same",
    "cost": "gigabytes and memory that batch norm adds to ResNet-50, compiled ahead of time for an H100",
    "collectives": "collectives and their bytes at 8 and at 256 devices",
    "memory": "what is kept for the backward pass, of a layer and, with parts computed again, of networks",
    "accuracy": "errors against float64",
    "cpu": "times on this CPU, and per element from 1 MB to 1 GB",
    "compile": "time to compile 60 layers, and by number of layers",
    "gpu": "times on this machine's GPU, against a copy",
}
RESULTS = pathlib.Path(__file__).with_name("RESULTS.md")
HEAD = """# Results

Written by `python -m benchmarks --save`; each section says when and with what. How a number came about is
said above its table, what else was tried in [NOTES.md](NOTES.md).
"""
PACKAGES = ("jax", "flax", "dm-haiku", "equinox", "torch", "jax-cuda13-plugin", "libtpu", "numpy")


def main():
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = "; ".join(f"{name}: {what}" for name, what in PARTS.items())
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"all if none is given. {listed}")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes and few rounds: a check that it runs"
    )
    parser.add_argument("--save", action="store_true", help=f"into {RESULTS.name}")
    parser.add_argument("--remark", default="", help="on the machine or the run, shown with the versions")
    parser.add_argument("--layers", nargs="*", default=[], metavar="NAME", help="such as jbn Flax; else all")
    parser.add_argument("--jobs", type=int, help="ahead-of-time compilations at once; else one per core")
    arguments = parser.parse_args()
    os.environ[LAYERS] = json.dumps(arguments.layers)
    if arguments.jobs:
        os.environ[JOBS] = str(arguments.jobs)
    if unknown := set(arguments.tables) - set(PARTS):
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for name in arguments.tables or PARTS:
        text = part(name, arguments.quick, arguments.remark)
        print(text, flush=True)
        if arguments.save:
            document = RESULTS.read_text() if RESULTS.exists() else HEAD
            RESULTS.write_text(tables.replaced(document, name, text, PARTS))


def part(name, quick, remark):
    print(f"measuring {name}: {PARTS[name]}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        environment = {"gpu": {}, "cpu": TIMED}.get(name, CPU)
        found = [tables.Table(**one) for one in apart(f"benchmarks.{name}:tables", environment, quick=quick)]
    except Failed as error:
        found = [tables.missing(name, str(error))]
    return tables.section(name, facts(time.perf_counter() - start, remark), found)


def facts(seconds, remark):
    """Date, machine, versions and how long it took, in one paragraph."""
    parts = [datetime.date.today().isoformat(), f"{cpu_model()}, {os.cpu_count()} cores"]
    parts += [remark] if remark else []
    parts += [
        f"Python {platform.python_version()}",
        f"jbn {jbn.__version__}",
        *filter(None, map(version, PACKAGES)),
    ]
    return "; ".join([*parts, f"took {seconds:.0f} s."])


def version(package):
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


if __name__ == "__main__":
    main()
