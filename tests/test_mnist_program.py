"""The MNIST example as a program: what it ends with, also where a signal stops it."""

import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np

import mnist
from mnist_options import Config
from tests import mnist_runs
from tests.mnist_runs import EXAMPLES, assert_same_bits, metrics, saved_state

# pytest finds a fixture by its name in the file of the test.
compile_once, data_dir, options = mnist_runs.compile_once, mnist_runs.data_dir, mnist_runs.options


def command(*arguments):
    return [sys.executable, str(EXAMPLES / "mnist.py"), *map(str, arguments)]


def run_program(*arguments):
    return subprocess.run(command(*arguments), check=False, capture_output=True, text=True, timeout=120)


def test_the_program_ends_with_its_accuracy_or_one_line(data_dir, tmp_path):
    arguments = ("--model", "mlp", "--max-steps", 3, "--output", tmp_path / "run", "--data-dir")
    good = run_program(*arguments, data_dir)
    assert good.returncode == 0, good.stderr
    assert re.fullmatch(r"test accuracy: [01]\.\d{4}", good.stdout.splitlines()[-1])
    bad = run_program(*arguments, tmp_path / "none")
    assert bad.returncode == 1
    assert bad.stderr == f"error: {tmp_path / 'none'}: no such folder of IDX files (--data-dir)\n"


def stopped(options, by):
    """Exit status and error output of the program, stopped by a signal after its first checkpoint."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    program = subprocess.Popen(command(*flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (options["output"] / "checkpoints" / "5").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        program.send_signal(by)
        _, stderr = program.communicate(timeout=30)
    finally:
        program.kill()
    return program.returncode, stderr


def test_a_killed_run_goes_on_with_nothing_lost(options, tmp_path, monkeypatch):
    """By SIGKILL, which leaves no time for anything, in the middle of whatever it did."""
    monkeypatch.setattr(mnist, "LOG_EVERY", 10)  # as it is in the program
    options = options | {"epochs": 30}
    whole = options | {"output": tmp_path / "whole"}
    accuracy = mnist.train(Config(**whole))
    status, stderr = stopped(options, signal.SIGKILL)
    assert status == -signal.SIGKILL, stderr
    assert saved_state(options)[0] < saved_state(whole)[0]
    assert mnist.train(Config(**options | {"resume": True})) == accuracy
    assert_same_bits(saved_state(options), saved_state(whole))
    assert metrics(options["output"]) == metrics(whole["output"])


def test_ctrl_c_leaves_a_usable_checkpoint(options):
    status, stderr = stopped(options | {"epochs": 100_000}, signal.SIGINT)
    assert status == 130, stderr
    assert re.fullmatch(
        r"stopped at step \d+ of 500000, saved in .*: --resume goes on", stderr.splitlines()[-1]
    )
    assert "Traceback" not in stderr
    step, state = saved_state(options | {"epochs": 100_000})
    assert step >= 5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
