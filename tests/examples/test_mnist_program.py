"""The MNIST example as a program: what it ends with, also where a signal stops it."""

import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import hosts
import mnist
from errors import Interrupted, UsageError
from mnist_options import Config, with_preset
from progress import StopRequest
from tests.support import mnist_runs
from tests.support.mnist_runs import EXAMPLES, metrics, saved_state
from tests.support.processes import arguments

pytestmark = pytest.mark.training
# pytest finds a fixture by its name in the file of the test.
compile_once, data_dir, options = mnist_runs.compile_once, mnist_runs.data_dir, mnist_runs.options

SECONDS = 300  # it takes a few; a hang must not hold up the other tests for ever


def test_the_program_ends_with_its_accuracy_or_one_line(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mnist.hosts, "_start", lambda _: None)  # it has to come before the first array
    monkeypatch.setattr(sys, "argv", ["mnist.py", *arguments(options)])
    mnist.main()
    assert re.fullmatch(r"test accuracy: [01]\.\d{4}", capsys.readouterr().out.splitlines()[-1])
    monkeypatch.setattr(sys, "argv", ["mnist.py", f"--data-dir={tmp_path / 'none'}"])
    with pytest.raises(SystemExit) as stop:
        mnist.main()
    # Which Python prints on stderr, with exit status 1.
    assert stop.value.code == f"error: {tmp_path / 'none'}: no such folder of IDX files (--data-dir)"


@pytest.mark.parametrize(
    ("error", "said"),
    [(UsageError("--seed: no"), "error: --seed: no\n"), (ValueError("a collective"), "Traceback")],
)
def test_one_of_several_processes_ends_at_once_after_an_error(error, said, monkeypatch, capsys):
    """Python's exit would wait for the others, which wait for its next step."""
    ended = []
    monkeypatch.setattr(hosts, "_start", lambda _: None)
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.os, "_exit", ended.append)
    with hosts.started(None):
        raise error
    assert ended == [1]
    assert capsys.readouterr().err.startswith(said)
    with pytest.raises(Interrupted), hosts.started(None):
        raise Interrupted("stopped", signal.SIGTERM)
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 1)
    with pytest.raises(type(error)), hosts.started(None):
        raise error
    assert ended == [1]


def stopped(options, by, *more):
    """Exit status and error output of the program, stopped by a signal after a checkpoint of its own."""
    folder = options["output"] / "checkpoints"
    before = saved(folder)
    command = [sys.executable, str(EXAMPLES / "mnist.py"), *arguments(options), *more]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # as here, also where there is a GPU
    program = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + SECONDS
    try:
        while saved(folder) <= before and program.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        program.send_signal(by)
        _, stderr = program.communicate(timeout=SECONDS)
    finally:
        program.kill()
    return program.returncode, stderr


def saved(folder):
    """The last step of which there is a whole checkpoint."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def test_a_program_that_a_signal_stops_goes_on_with_nothing_lost(options, tmp_path, monkeypatch):
    """By Ctrl-C, and by SIGKILL, which leaves no time for anything, in the middle of whatever it does."""
    options |= {"epochs": 100_000}  # more than it could take
    status, stderr = stopped(options, signal.SIGINT)
    assert status == 130, stderr
    said = re.fullmatch(
        r"stopped at step (\d+) of 500000, saved in .*: --resume goes on", stderr.splitlines()[-1]
    )
    assert said, stderr
    assert "Traceback" not in stderr
    step, state = saved_state(options)
    assert step == int(said[1]) >= 5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    rows = metrics(options["output"])
    status, stderr = stopped(options, signal.SIGKILL, "--resume")
    assert status == -signal.SIGKILL, stderr
    monkeypatch.setattr(mnist, "LOG_EVERY", 10)  # as it is in the program
    run = mnist.Run(with_preset(Config(**options | {"resume": True})))
    assert run.step > step
    with StopRequest() as stop:
        run.train_epoch(stop)
    run.close()
    after = metrics(options["output"])
    assert after[: len(rows)] == rows
    # A run that nothing stopped has the same weights at that step, to what rounding may differ in by then.
    whole = mnist.Run(with_preset(Config(**options | {"output": tmp_path / "whole"})))
    with StopRequest() as stop:
        while whole.step < run.step:
            whole.train_epoch(stop)
    whole.close()
    for one, other in zip(
        *(jax.tree.leaves(r.placement.get(r.state.params)) for r in (run, whole)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-2)
    assert [int(row["step"]) for row in after] == list(range(5, run.step + 1, 5))
