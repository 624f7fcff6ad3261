"""Trains a ResNet on a folder of pictures, train/CLASS/*.jpg and val/CLASS/*.jpg (or png).

    python examples/resnet/train.py --data-dir imagenet               ResNet-50, 90 epochs of SGD
    python examples/resnet/train.py --data-dir imagenet --resume      goes on, bit for bit, where it stopped

Checkpoints, metrics.csv, norms.csv, curves.png and model.safetensors go to the output folder.
"""

import functools
import itertools
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from chex import ArrayTree

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the examples share

import hosts
import parallel
from batches import num_batches
from errors import Interrupted, UsageError, one_line_errors
from progress import ProgressBar, StopRequest
from resnet.data import CenterCrops, Pictures, RandomCrop, evaluation_batches, training_batches
from resnet.log import Log
from resnet.model import make_model, save_model
from resnet.options import Config, check, model_attributes, settings
from resnet.step import (
    Report,
    State,
    accuracy,
    make_evaluation_step,
    make_optimizer,
    make_train_step,
    recalibrate,
)
from runs import Checkpoints, has_checkpoint, set_aside

TOO_MANY = 20  # steps in a row with NaN gradients: the run is lost


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    with one_line_errors(), hosts.started(config):
        accuracy = train(config)
    if hosts.is_main():
        print(f"test accuracy: {accuracy:.4f}")


def train(config: Config) -> float:
    """Trains, or goes on training, and returns the test accuracy of the model that it writes."""
    check(config)
    run = Run(config)
    try:
        with StopRequest() as stop:
            while run.step < run.total_steps:
                run.train_epoch(stop)
            return run.finish(stop)
    finally:
        run.close()


class Run:
    """A training run: its data, its state, and its folder, which the main process alone writes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.placement = parallel.Placement(hosts.choose_devices(config.devices), stacked=False)
        multiple = self.placement.num_devices * config.accumulate
        if config.batch_size % multiple:
            raise UsageError(
                f"--batch-size {config.batch_size}: expected a multiple of {multiple}, devices x --accumulate"
            )
        rows = config.batch_size // config.accumulate
        if config.norm == "ghost" and rows % config.ghost_size:
            raise UsageError(
                f"--ghost-size {config.ghost_size}: expected a divisor of {rows}, --batch-size / --accumulate"
            )
        self._open_data()
        self.steps_per_epoch = max(len(self.pictures) // config.batch_size, 1)
        self.last_top1: float | None = None
        self.total_steps = min(config.epochs * self.steps_per_epoch, config.max_steps or sys.maxsize)
        self._make_programs()
        self._open_folder()

    def _open_data(self) -> None:
        config = self.config
        self.pictures = Pictures(config.data_dir / "train", broken=config.broken)
        self.test_pictures = Pictures(config.data_dir / "val", broken=config.broken)
        if self.pictures.classes != self.test_pictures.classes:
            raise UsageError(f"{config.data_dir}: train/ and val/ have different class folders")
        if self.pictures.empty:
            raise UsageError(
                f"{config.data_dir / 'train' / self.pictures.empty[0]}: holds no JPEG or PNG files"
            )
        self.readers = {
            "part": jax.process_index(),
            "num_parts": jax.process_count(),
            "workers": config.workers,
            "threads": config.threads,
        }
        crop = RandomCrop(config.image_size, smallest=config.crop_scale, flip=config.flip)
        self.batches = training_batches(
            self.pictures, crop, config.batch_size, seed=config.seed, **self.readers
        )

    def _make_programs(self) -> None:
        config = self.config
        self.model_attributes = model_attributes(config, len(self.pictures.classes))
        self.model = make_model(self.model_attributes)
        image = np.zeros((1, config.image_size, config.image_size, 3), np.uint8)
        self._init = functools.partial(self.model.init, images=image, train=False)
        like = jax.eval_shape(self._init, jax.random.key(config.seed))
        self.optimizer, self.schedule = make_optimizer(config, like, self.steps_per_epoch, self.total_steps)
        self.train_step = make_train_step(self.model, self.optimizer, config, self.total_steps)
        self.evaluation_step = make_evaluation_step(self.model)

    def _open_folder(self) -> None:
        """Begins at step 0, or where the run in the folder was."""
        output, data = self.config.output, None
        # Only the main process needs to see the folder.
        resume = hosts.any_process(self.config.resume and hosts.is_main() and has_checkpoint(output))
        state, self.step = self._initial_state(resume=resume), 0
        if hosts.is_main():
            if self.config.resume and not resume:
                print(f"--resume: {output} holds no checkpoint, so this run begins at step 0")
            earlier = None if resume else set_aside(output)
            if earlier:
                print(f"the earlier run in {output} is now in {earlier}")
            self.checkpoints = Checkpoints(output, create=not resume)
            if resume:
                self.step, state, data = self.checkpoints.restore(state, self._settings())
                print(f"resuming {output} at step {self.step} of {self.total_steps}")
            self.log = Log(output, last_step=self.step, tensorboard=self.config.tensorboard)
        step, state = hosts.from_main((np.array(self.step), state))
        self.step, self.state = int(step), self.placement.put_state(state)
        if resume:
            self.batches.set_state(hosts.json_from_main(data))

    def _initial_state(self, *, resume: bool) -> State:
        """A new state; of one that is about to be restored, only the structure."""

        def init(key: jax.Array) -> State:
            variables = self._init(key)
            params = variables["params"]
            average = None if self.config.average is None else params
            opt_state = self.optimizer.init(params)
            return State(jnp.int32(0), params, variables["batch_stats"], opt_state, average)

        key = jax.random.key(self.config.seed)
        if resume:
            return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(init, key))
        return jax.device_get(jax.jit(init)(key))

    def _settings(self) -> dict[str, Any]:
        checksum = zlib.crc32("\n".join(self.pictures.names).encode())
        return settings(self.config) | {"data": f"{len(self.pictures)} files, crc32 {checksum:08x}"}

    def train_epoch(self, stop: StopRequest) -> None:
        """Trains to the end of the epoch, from wherever in it the run is; then evaluates and saves."""
        size, epoch = self.config.batch_size, self.step // self.steps_per_epoch
        first, last = (min(self.total_steps, (epoch + i) * self.steps_per_epoch) for i in (0, 1))
        begun, started = self.step, time.monotonic()
        total, done = ((steps - first) * size for steps in (last, self.step))
        with ProgressBar(f"epoch {epoch + 1}", total, done=done, visible=hosts.is_main()) as bar:
            while self.step < last:
                # To ask the other processes costs a message.
                if jax.process_count() == 1 or self.step % self.config.log_every == 0:
                    self._stop_if_asked(stop, save=True)
                report = self.train_on(next(self.batches))
                bar.update(size)
                if self.step % self.config.log_every == 0 and self.step < last:
                    bar.show_loss(self._log(report))
                # A run that is stopped while it evaluates repeats the last step, for its loss and moments.
                due = self.step % self.config.checkpoint_every == 0 or self.step == last - 1
                if due and self.step < last:
                    self._save()
        jax.block_until_ready(self.state)
        rate = (self.step - begun) * size / (time.monotonic() - started)
        self._end_epoch(epoch, report, f"{rate:,.0f} images/s", stop)

    def _end_epoch(self, epoch: int, report: Report, rate: str, stop: StopRequest) -> None:
        """Evaluates, reports every batch norm, and saves."""
        top1, top5 = self.accuracy(self.variables(), stop)
        self.last_top1 = top1
        measured = {"test_accuracy": top1, "test_top5": top5}
        notes = ()
        if hosts.is_main():
            variables, moments = self.placement.get((self.variables(), report.moments))
            measured["drift"], notes = self.log.report_norms(variables, moments, self.step)
        loss = self._log(report, **measured)
        self._save()
        if hosts.is_main():
            print(f"epoch {epoch + 1}: loss {loss:.4f}, test accuracy {top1:.4f}, top 5 {top5:.4f}, {rate},")
            print(f"    largest drift of a batch norm {measured['drift']:.2f}", flush=True)
            for note in notes:
                print(f"    {note}", flush=True)

    def train_on(self, batch: Any) -> Report:
        self.state, report = self.train_step(self.state, self.placement.put_batch(batch))
        self.step += 1
        return report

    def variables(self) -> ArrayTree:
        return {"params": self.state.params, "batch_stats": self.state.batch_stats}

    def accuracy(self, variables: ArrayTree, stop: StopRequest) -> tuple[float, float]:
        """Top-1 and top-5 accuracy on the test pictures."""
        config, devices = self.config, self.placement.num_devices
        crops = CenterCrops(self.test_pictures, config.image_size, part=config.center_crop)
        size = num_batches(config.batch_size, devices) * devices
        batches = evaluation_batches(crops, len(self.test_pictures), size, **self.readers)
        ask = functools.partial(self._stop_if_asked, stop, save=False)
        return accuracy(self.evaluation_step, variables, batches, self.placement, before_each=ask)[:2]

    def _log(self, report: Report, **measured: float) -> float:
        """Writes a row of metrics.csv; returns the loss as a number."""
        optimizer = self.state.opt_state
        numbers = self.placement.get((report.loss, optimizer.total_notfinite, optimizer.notfinite_count))
        loss, skipped, in_a_row = numbers
        if in_a_row >= TOO_MANY:
            raise UsageError(f"step {self.step}: gradients were NaN or inf in {in_a_row} steps in a row")
        row = {
            "step": self.step,
            "epoch": (self.step - 1) // self.steps_per_epoch + 1,
            "loss": float(loss),
            # The schedule counts the steps that were taken: this is the rate of the last of them.
            "learning_rate": float(self.schedule(max(self.step - 1 - int(skipped), 0))),
            "skipped": int(skipped),
        } | {name: measured.get(name) for name in ("test_accuracy", "test_top5", "drift")}
        if hosts.is_main():
            self.log.write(row)
        return float(loss)

    def _save(self) -> None:
        if hosts.is_main():
            # Every process has read as many batches, and so has the same state of the data.
            state, data = self.placement.get(self.state), self.batches.get_state()
            self.checkpoints.save(self.step, state, self._settings(), data)

    def _stop_if_asked(self, stop: StopRequest, *, save: bool) -> None:
        if hosts.any_process(stop.requested):
            if save:
                self._save()
            where = f"step {self.step} of {self.total_steps}"
            text = f"stopped at {where}, saved in {self.config.output}: --resume goes on"
            raise Interrupted(text, stop.number)

    def finish(self, stop: StopRequest) -> float:
        """Writes the model; of an average of the weights with statistics that are measured anew."""
        variables = self.variables()
        if self.state.average is not None:
            batches = itertools.islice(self.batches, self.config.recalibrate_batches)
            stream = map(self.placement.put_batch, batches)
            variables = recalibrate(self.model, variables | {"params": self.state.average}, stream)
        if self.state.average is None and self.last_top1 is not None:
            top1 = self.last_top1
        else:  # weights that no epoch tested: an average, or those of a run that was resumed at its end
            top1, _ = self.accuracy(variables, stop)
        about = {
            "model": self.model_attributes,
            "classes": self.pictures.classes,
            "image_size": self.config.image_size,
            "center_crop": self.config.center_crop,
        }
        if hosts.is_main():
            save_model(self.config.output / "model.safetensors", self.placement.get(variables), about)
        return top1

    def close(self) -> None:
        """Draws the curves and closes the files; first the checkpoints, if there is time for no more."""
        if hosts.is_main():
            self.checkpoints.close()
        self.batches.close()
        if hosts.is_main():
            self.log.close()


if __name__ == "__main__":
    main()
