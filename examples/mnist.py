"""Trains a small net with batch norm on MNIST, to about 99.2 % test accuracy in a minute or two on a CPU.

    python examples/mnist.py                    a convolutional net
    python examples/mnist.py --model mlp        two hidden layers on 784 pixels, Adam 0.001, 1000 steps
    python examples/mnist.py --resume           goes on where a stopped run was

Checkpoints, metrics.csv and curves.png go to the output folder. README.md here shows runs on many devices.
"""

import time
import zlib
from typing import Any

import jax
import numpy as np
import optax
import tyro
from chex import ArrayTree

import batches
import hosts
import models
import parallel
from batches import Batch
from curves import MetricsFile, draw_curves, percentile_columns
from errors import Interrupted, UsageError, one_line_errors
from idx import Split, load_splits
from mnist_options import Config, settings, with_preset
from progress import ProgressBar, StopRequest
from runs import Checkpoints, set_aside

LOG_EVERY = 10  # steps between rows of metrics.csv; each waits for the device, so not every step
TEST_BATCH = 1000


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    with one_line_errors(), hosts.started(config):
        accuracy = train(config)
    if hosts.is_main():
        print(f"test accuracy: {accuracy:.4f}")


def train(config: Config) -> float:
    """Trains, or goes on training, and returns the test accuracy."""
    run = Run(with_preset(config))
    try:
        with StopRequest() as stop:
            while run.step < run.total_steps:
                run.train_epoch(stop)
        return run.test_accuracy()
    finally:
        run.close()


def load(config: Config) -> tuple[Split, Split]:
    """The training set, cut to `train_size`, and the test set."""
    train_set, test_set = load_splits(config.data_dir)
    size = len(train_set.labels) if config.train_size is None else config.train_size
    if size > len(train_set.labels):
        raise UsageError(f"--train-size {size}: {config.data_dir} has {len(train_set.labels)} images")
    return Split(train_set.images[:size], train_set.labels[:size]), test_set


def make_optimizer(config: Config, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Adam with decoupled weight decay (none at all is plain Adam), and the learning rate that it follows."""
    if config.model == "cnn":
        schedule = optax.cosine_onecycle_schedule(total_steps, config.learning_rate, pct_start=0.2)
    else:
        schedule = optax.constant_schedule(config.learning_rate)
    return optax.adamw(schedule, weight_decay=config.weight_decay, mask=is_kernel), jax.jit(schedule)


def is_kernel(params: ArrayTree) -> ArrayTree:
    """True for kernels, False for vectors: batch norm's scale and bias, and biases."""
    return jax.tree.map(lambda param: param.ndim > 1, params)


class Run:
    """A training run: its state, and its folder, which the main process alone writes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.train_set, self.test_set = load(config)
        self.steps_per_epoch = batches.num_batches(len(self.train_set.labels), config.batch_size)
        limits = [config.epochs and config.epochs * self.steps_per_epoch, config.max_steps]
        self.total_steps = min(limit for limit in limits if limit is not None)
        self.optimizer, self.schedule = make_optimizer(config, self.total_steps)
        self._spread_over_devices()
        self._open_folder()

    def _spread_over_devices(self) -> None:
        config = self.config
        devices = hosts.choose_devices(config.devices)
        self.placement = parallel.Placement(devices, stacked=config.parallel == "pmap")
        net = {"cnn": models.Cnn, "mlp": models.Mlp}[config.model]
        axis_name = None if config.parallel == "jit" else parallel.AXIS
        self.model = net(momentum=config.momentum, axis_name=axis_name)
        if config.parallel == "jit":
            self.train_step = parallel.jit_step(self.model, self.optimizer)
        elif config.parallel == "shard_map":
            self.train_step = parallel.shard_map_step(self.model, self.optimizer, self.placement.mesh)
        else:
            self.train_step = parallel.pmap_step(self.model, self.optimizer, devices)
        self.count_correct = parallel.count_correct(self.model)

    def _open_folder(self) -> None:
        """Begins at step 0, or where the run in the folder was."""
        state, self.step = self._initial_state(), 0
        if hosts.is_main():
            output = self.config.output
            earlier = None if self.config.resume else set_aside(output)
            if earlier:
                print(f"the earlier run in {output} is now in {earlier}")
            self.checkpoints = Checkpoints(output, create=not self.config.resume)
            if self.config.resume:
                self.step, state, _ = self.checkpoints.restore(state, self._settings())
                print(f"resuming {output} at step {self.step} of {self.total_steps}")
            self.metrics = MetricsFile(output / "metrics.csv", last_step=self.step)
        step, state = hosts.from_main((np.array(self.step), state))
        self.step, self.state = int(step), self.placement.put_state(state)

    def _initial_state(self) -> parallel.State:
        """A new state; of one that is about to be restored, only the structure."""

        def init(key: jax.Array, images: np.ndarray) -> parallel.State:
            variables = self.model.init(key, images, train=False)
            params, batch_stats = variables["params"], variables["batch_stats"]
            return parallel.State(params, batch_stats, self.optimizer.init(params))

        key, image = jax.random.key(self.config.seed), self.train_set.images[:1]
        if self.config.resume:
            return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(init, key, image))
        return jax.device_get(jax.jit(init)(key, image))

    def _settings(self) -> dict[str, Any]:
        checksum = zlib.crc32(self.train_set.labels, zlib.crc32(self.train_set.images))
        return settings(self.config) | {"data": f"crc32 {checksum:08x}"}

    def train_epoch(self, stop: StopRequest) -> None:
        """Trains to the end of the epoch, from wherever in it the run is; then tests and saves."""
        size = self.config.batch_size
        epoch, done = divmod(self.step, self.steps_per_epoch)
        last_step = min(self.total_steps, (epoch + 1) * self.steps_per_epoch)
        order = batches.epoch_order(self.config.seed, epoch, len(self.train_set.labels))
        todo = order[done * size : (last_step - epoch * self.steps_per_epoch) * size]
        started = time.monotonic()
        with ProgressBar(f"epoch {epoch + 1}", len(order), done=done * size, visible=hosts.is_main()) as bar:
            for first in range(0, len(todo), size):
                self._stop_if_asked(stop)
                rows = todo[first : first + size]
                loss = self._train_on(rows)
                bar.update(len(rows))
                if self.step % LOG_EVERY == 0 and self.step < last_step:
                    bar.show_loss(self._log(loss))
        rate = f"{len(todo) / (time.monotonic() - started):,.0f} images/s"
        accuracy = self.test_accuracy()
        loss = self._log(loss, accuracy)
        self._save()
        if hosts.is_main():
            print(f"epoch {epoch + 1}: loss {loss:.4f}, test accuracy {accuracy:.4f}, {rate}", flush=True)

    def _train_on(self, rows: np.ndarray) -> jax.Array:
        batch = self._batch(self.train_set, rows, self.config.batch_size)
        self.state, loss = self.train_step(self.state, self.placement.put_batch(batch))
        self.step += 1
        return loss

    def _batch(self, split: Split, rows: np.ndarray, size: int) -> Batch:
        """This process's part of a batch, which is padded to be cut into equal parts for all devices."""
        size = batches.num_batches(size, self.placement.num_devices) * self.placement.num_devices
        return batches.take(split, rows, size, part=jax.process_index(), num_parts=jax.process_count())

    def test_accuracy(self) -> float:
        """The part of the test images that the net, with its running statistics, gets right."""
        state = self.placement.replicate(self.placement.get(self.state))
        count, correct = len(self.test_set.labels), 0
        for first in range(0, count, TEST_BATCH):
            rows = np.arange(first, min(first + TEST_BATCH, count))
            batch = self.placement.shard(self._batch(self.test_set, rows, TEST_BATCH))
            correct += int(self.count_correct(state, batch))
        return correct / count

    def _log(self, loss: jax.Array, accuracy: float | None = None) -> float:
        """Writes a row of metrics.csv; returns the loss as a number."""
        loss = float(self.placement.get(loss))
        if hosts.is_main():
            row = {
                "step": self.step,
                "epoch": (self.step - 1) // self.steps_per_epoch + 1,
                "loss": loss,
                "learning_rate": float(self.schedule(self.step - 1)),
                "test_accuracy": accuracy,
            }
            self.metrics.write(row | percentile_columns(self.placement.get(self.state.batch_stats)))
        return loss

    def _save(self) -> None:
        if hosts.is_main():
            self.checkpoints.save(self.step, self.placement.get(self.state), self._settings())

    def _stop_if_asked(self, stop: StopRequest) -> None:
        may_ask = jax.process_count() == 1 or self.step % LOG_EVERY == 0  # asking others costs a message
        if may_ask and hosts.any_process(stop.requested):
            self._save()
            where = f"step {self.step} of {self.total_steps}"
            text = f"stopped at {where}, saved in {self.config.output}: --resume goes on"
            raise Interrupted(text, stop.number)

    def close(self) -> None:
        """Draws the curves and closes the files."""
        if hosts.is_main():
            self.metrics.close()
            self.checkpoints.close()
            draw_curves(self.config.output / "metrics.csv", self.config.output / "curves.png")


if __name__ == "__main__":
    main()
