"""Several processes, and more devices than this one has: the answer of one device, and no hang."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.support import process_worker
from tests.support.cases import assert_close, tolerance
from tests.support.processes import SECONDS, ended, free_port, started

ROWS, CHANNELS = 32, 3
# Seconds after which a process is taken for dead, where one leaves; else `SECONDS`, for busy machines.
SILENCE = 10
ROOT = Path(__file__).parents[2]


def inputs():
    """Masked so that devices have different counts, some of them none, and NaN where masked."""
    rng = np.random.default_rng(0)
    mask = np.arange(ROWS) < 21
    x = (rng.standard_normal((ROWS, CHANNELS)) * 2 + np.linspace(-2, 2, ROWS)[:, None]).astype(np.float32)
    return {
        "x": np.where(mask[:, None], x, np.float32(np.nan)),
        "cotangent": rng.standard_normal((ROWS, CHANNELS)).astype(np.float32),
        "mask": mask,
        "scale": rng.uniform(0.5, 1.5, CHANNELS).astype(np.float32),
        "bias": rng.standard_normal(CHANNELS).astype(np.float32),
    }


def run(folder, devices, processes=1, leaves=None):
    """Starts the workers and waits: [(exit status, output file, what it said)].

    `leaves` maps the index of a process to the number of steps after which it leaves.
    """
    np.savez(folder / "inputs.npz", **inputs())
    address, outputs = f"localhost:{free_port()}", [folder / f"{index}.npz" for index in range(processes)]
    commands = []
    for index, output in enumerate(outputs):
        several = [address, processes, index, SILENCE if leaves else SECONDS, (leaves or {}).get(index, -1)]
        command = [process_worker.__file__, folder / "inputs.npz", output, devices]
        commands.append(command + (several if processes > 1 else []))
    with started(commands, PYTHONPATH=str(ROOT)) as programs:
        return [
            (status, output, said) for output, (status, said) in zip(outputs, ended(programs), strict=True)
        ]


def assert_as_on_one_device(folder, devices, processes=1):
    found = {}
    for status, path, said in run(folder, devices, processes):
        assert status == 0, said
        found |= dict(np.load(path))
    data = inputs()
    params = {name: data[name] for name in ("scale", "bias")}
    expected = jax.jit(process_worker.step)(params, *(data[name] for name in ("x", "cotangent", "mask")))
    rows = ROWS // (devices * processes)
    rows_used = np.concatenate([data["x"][data["mask"]] * factor for factor in (1, 2)])
    for name, wanted in (("mean", rows_used.mean(0)), ("var", rows_used.var(0))):
        for index in range(processes):
            assert_close(found.pop(f"recalibrated {name} {index}"), wanted, tolerance(np.float32))
    values = {key: value for key, value in found.items() if not key.endswith("all-reduces")}
    assert len(values) == 3 * len(expected) * devices * processes
    for key, value in values.items():
        way, name, start, _ = key.split()
        whole = np.asarray(expected[name])
        split = process_worker.SPLIT[name]
        wanted = whole[int(start) : int(start) + rows] if split else whole
        used = data["mask"][int(start) : int(start) + rows, None] if name == "y" else None
        assert_close(value, wanted, tolerance(np.float32), where=used)
        if not split:
            first = next(other for other in values if other.startswith(f"{way} {name} "))
            np.testing.assert_array_equal(value, values[first])
    return found


def test_two_processes_are_one_device(tmp_path):
    assert_as_on_one_device(tmp_path, devices=2, processes=2)


def test_sixteen_devices_are_one_device(tmp_path):
    """Above eight, statistics take two collectives of constant size instead of one that grows."""
    found = assert_as_on_one_device(tmp_path, devices=16)
    for way in ("shard_map", "unchecked"):
        assert 2 <= found[f"{way} all-reduces"] <= 3 + (way == "unchecked")


@pytest.mark.parametrize(("index", "after"), [(0, 1), (1, 0), (1, 1)])
def test_a_process_that_dies_ends_the_other_with_an_error(tmp_path, index, after):
    """Process 0 is the coordinator."""
    for status, outputs, said in run(tmp_path, devices=2, processes=2, leaves={index: after}):
        assert status != 0, said
        assert not outputs.exists()
