"""Functions in processes of their own: devices, platforms and compiler flags are fixed once JAX is loaded.

    python -m benchmarks.processes benchmarks.accuracy:tables '[[], {"quick": true}]'

prints what `tables(quick=True)` returned, as JSON.
"""

import concurrent.futures
import importlib
import json
import os
import re
import subprocess
import sys

CPU = {"JAX_PLATFORMS": "cpu"}
# glibc hands large arrays back to the system when they are freed, or not, as it happened to place them. The
# page faults of the next ones are up to half of a step's time, and fall now on one layer and now on another.
TIMED = CPU | {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
# Without autotuning, compiling for a GPU needs none, and comes out the same on every machine.
AHEAD = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compile at once
}
JOBS = "BENCHMARKS_JOBS"


class Failed(Exception):
    """The error that ended a process."""


def apart(function, environment=CPU, *positional, **named):
    """What `function` ("module:name") returns for these arguments, all of which go through JSON."""
    command = [sys.executable, "-m", "benchmarks.processes", function, json.dumps([positional, named])]
    process = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if process.returncode:
        causes = re.findall(r"^[\w.]*(?:Error|Exception|Exit)\b.*", process.stderr, re.MULTILINE)
        raise Failed(causes[-1] if causes else f"exit status {process.returncode}")
    return json.loads(process.stdout.splitlines()[-1])


def parallel(function, tasks, environment):
    """What `function` returns for each tuple of arguments, or {"failed": why}; `JOBS` at once."""

    def one(task):
        try:
            return apart(function, environment, *task)
        except Failed as error:
            return {"failed": str(error)}

    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get(JOBS, os.cpu_count() or 1))) as pool:
        return list(pool.map(one, tasks))


def main():
    module, name = sys.argv[1].split(":")
    positional, named = json.loads(sys.argv[2])
    result = getattr(importlib.import_module(module), name)(*positional, **named)
    print(json.dumps(result, default=vars))  # a Table as its fields


if __name__ == "__main__":
    main()
