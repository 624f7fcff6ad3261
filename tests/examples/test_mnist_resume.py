"""Runs of the MNIST example that stop and go on: nothing is lost, and nothing is mixed up."""

import signal

import pytest

import mnist
from errors import Interrupted, UsageError
from mnist_options import Config
from tests.support import mnist_runs
from tests.support.mnist_runs import assert_same_bits, metrics, saved_state

pytestmark = pytest.mark.training
# pytest finds a fixture by its name in the file of the test.
compile_once, data_dir, options = mnist_runs.compile_once, mnist_runs.data_dir, mnist_runs.options


def test_a_stopped_run_goes_on_bit_for_bit(options, tmp_path, monkeypatch, capsys):
    whole = options | {"output": tmp_path / "whole"}
    accuracy = mnist.train(Config(**whole))
    train_on = mnist.Run._train_on

    def interrupted_at_step_7(run, rows):
        if run.step == 6:
            signal.raise_signal(signal.SIGINT)
        return train_on(run, rows)

    with monkeypatch.context() as patch:
        patch.setattr(mnist.Run, "_train_on", interrupted_at_step_7)
        with pytest.raises(Interrupted, match="stopped at step 7 of 10"):
            mnist.train(Config(**options))
    assert saved_state(options)[0] == 7
    # A killed program may have written rows that no checkpoint has, the last one (here of step 10) in part.
    last_row = (options["output"] / "metrics.csv").read_text().splitlines()[-1]
    with (options["output"] / "metrics.csv").open("a") as file:
        file.write(f"8{last_row[1:]}\n1")
    assert mnist.train(Config(**options | {"resume": True})) == accuracy
    assert "at step 7 of 10" in capsys.readouterr().out
    assert_same_bits(saved_state(options), saved_state(whole))
    assert metrics(options["output"]) == metrics(whole["output"])
    # And a finished one has nothing to do but tell.
    assert mnist.train(Config(**options | {"resume": True})) == accuracy
    assert metrics(options["output"]) == metrics(whole["output"])


def test_a_new_run_keeps_the_earlier_one(options):
    for epochs in (1, 2):
        mnist.train(Config(**options | {"epochs": epochs}))
    for epochs, folder in ((1, options["output"] / "earlier-1"), (2, options["output"])):
        assert saved_state(options | {"epochs": epochs, "output": folder})[0] == 5 * epochs
        assert len(metrics(folder)) == 3 * epochs


def test_a_resumed_run_has_to_be_the_same_run(options):
    with pytest.raises(UsageError, match="run holds no checkpoint"):
        mnist.train(Config(**options | {"resume": True}))
    mnist.train(Config(**options | {"epochs": 1}))
    with pytest.raises(UsageError, match="batch_size 16, seed 0, and is now given batch_size 8, seed 1"):
        mnist.train(Config(**options | {"epochs": 1, "resume": True, "batch_size": 8, "seed": 1}))
    with pytest.raises(UsageError, match="began with model mlp"):
        mnist.train(Config(**options | {"epochs": 1, "resume": True, "model": "cnn"}))
    with pytest.raises(UsageError, match=r"began with .*data crc32"):
        mnist.train(Config(**options | {"epochs": 1, "resume": True, "train_size": 60}))
