"""Devices and processes: how many take part, and how processes come to agree."""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np
from chex import ArrayTree
from jax.experimental import multihost_utils

from errors import Interrupted, UsageError


class Options(Protocol):
    """How many devices each process wants, of which a CPU can be any number, and where the processes meet.

    `coordinator`: HOST:PORT of process 0, with `num_processes` and `process_id`; None where a cluster (SLURM,
    a TPU pod, ...) announces itself, or there is one process.
    """

    devices: int | None
    coordinator: str | None
    num_processes: int | None
    process_id: int | None


@contextlib.contextmanager
def started(options: Options) -> Iterator[None]:
    """Sets JAX up. To be entered before the first array is made.

    Where there are other processes, one that meets an error ends at once: Python's own exit would wait for
    the others, which wait for its next step.
    """
    _start(options)
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, Interrupted):  # all processes were
            raise
        if isinstance(error, UsageError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        os._exit(1)


def _start(options: Options) -> None:
    if options.devices is not None:
        jax.config.update("jax_num_cpu_devices", options.devices)
    if options.coordinator is not None:
        num_processes, process_id = options.num_processes, options.process_id
        if num_processes is None or process_id is None:
            raise UsageError("--coordinator: needs --num-processes and --process-id beside it")
        if not 0 <= process_id < num_processes:
            raise UsageError(f"--process-id {process_id}: expected 0 to {num_processes - 1}")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(options.coordinator, num_processes, process_id)
        return
    with contextlib.suppress(ValueError):  # no cluster announces itself: a single process
        jax.distributed.initialize()


def choose_devices(per_process: int | None) -> list[jax.Device]:
    """The first `per_process` devices of each process, or all of them: grouped by process."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if per_process is None:
        return devices
    if per_process > jax.local_device_count():
        raise UsageError(f"--devices {per_process}: there are {jax.local_device_count()} here")
    chosen = []
    for process in range(jax.process_count()):
        chosen += [device for device in devices if device.process_index == process][:per_process]
    return chosen


def is_main() -> bool:
    """True in the one process that writes files and shows progress."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """True if `flag` is in some process. All have to ask at the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def from_main(tree: ArrayTree) -> ArrayTree:
    """The main process's values of a tree of NumPy arrays, in every process."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def json_from_main(value: Any) -> Any:
    """The main process's value, of whatever JSON can hold, in every process."""
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(from_main(np.array(len(content))))
    return json.loads(from_main(np.resize(content, size)).tobytes())
