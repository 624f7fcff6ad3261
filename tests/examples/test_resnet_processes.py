"""The ResNet example as a program of two processes: the curve of one, and no process that is left behind."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("safetensors")

import resnet.train
from resnet.options import Config
from tests.support import resnet_runs
from tests.support.processes import SECONDS, arguments, ended, free_port, started

pytestmark = pytest.mark.training
# pytest finds a fixture by its name in the file of the test.
data_dir, options = resnet_runs.data_dir, resnet_runs.options


def test_two_processes_train_as_one_and_a_signal_to_one_stops_both(options):
    """The signal goes to the process that writes nothing; the other saves for both."""
    options |= {"epochs": 10_000, "warmup_epochs": 1e4, "checkpoint_every": 1}  # more than they could take
    address, folder = f"localhost:{free_port()}", options["output"] / "checkpoints"
    options_of_both = arguments(options | {"coordinator": address, "num_processes": 2})
    commands = [[resnet.train.__file__, *options_of_both, f"--process-id={index}"] for index in range(2)]
    with started(commands) as programs:
        deadline = time.monotonic() + SECONDS
        while not (folder / "3").exists() and programs[0].poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        programs[1].send_signal(signal.SIGTERM)
        (status, said), (other_status, other_said) = ended(programs)
    assert (status, other_status) == (143, 143), said + other_said
    saved = max(int(path.name) for path in folder.iterdir())
    assert f"stopped at step {saved} of 30000, saved in" in said
    assert other_said.count("epoch") == 0

    run = resnet.train.Run(Config(**options | {"output": Path(options["output"]) / "one"}))
    expected = [float(run.train_on(next(run.batches)).loss) for _ in range(3)]
    run.close()
    with open(options["output"] / "metrics.csv") as table:
        found = np.loadtxt(table, delimiter=",", skiprows=1, usecols=2, max_rows=3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
