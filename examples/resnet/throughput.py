"""Measures what waits for what: pictures per second of the loader alone, of the step alone, of both together.

    python examples/resnet/throughput.py --data-dir imagenet --depth 50

It takes the options of train.py, and leaves the output folder alone.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the examples share

import hosts
from errors import one_line_errors
from resnet.options import Config, check
from resnet.train import Run

STEPS = 50


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    with one_line_errors(), hosts.started(config), tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, output=Path(folder), resume=False)
        check(config)
        run = Run(config)
        batch = next(run.batches)
        run.train_on(batch)  # compiles
        ways = {
            "loader alone": lambda: next(run.batches),
            "step alone": lambda: run.train_on(batch),
            "both": lambda: run.train_on(next(run.batches)),
        }
        if hosts.is_main():
            devices = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
            print(f"{devices}, ResNet-{config.depth}, {config.norm}")
        for name, call in ways.items():
            rate = STEPS * config.batch_size / seconds(run, call)
            if hosts.is_main():
                print(f"{name}: {rate:,.0f} pictures/s", flush=True)
        run.close()


def seconds(run: Run, call: Callable[[], object]) -> float:
    """Of STEPS calls, until the last one is done; the batches that were read before come first."""
    for _ in range(4 * (run.config.workers or run.config.threads)):  # more than the loader holds
        call()
    jax.block_until_ready(run.state)
    started = time.perf_counter()
    for _ in range(STEPS):
        call()
    jax.block_until_ready(run.state)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
