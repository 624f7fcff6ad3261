"""The folder of a training run: checkpoints by Orbax, and what an earlier run left there."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from errors import UsageError

CHECKPOINTS = "checkpoints"
LEFT = (CHECKPOINTS, "metrics.csv", "curves.png", "norms.csv", "tensorboard", "model.safetensors")


def set_aside(folder: Path) -> Path | None:
    """Moves what an earlier run left in `folder` to `folder/earlier-1` (or 2, ...), so that nothing is lost.

    Returns:
      Where it is now, or None if there was nothing.
    """
    left = [folder / name for name in LEFT if (folder / name).exists()]
    if not left:
        return None
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    earlier = folder / f"earlier-{number}"
    earlier.mkdir()
    for path in left:
        os.replace(path, earlier / path.name)
    return earlier


def has_checkpoint(folder: Path) -> bool:
    """Whether a run in `folder` can go on. One that is half written has a longer name than its step."""
    return any(path.name.isdecimal() for path in (folder / CHECKPOINTS).glob("*"))


class Checkpoints:
    """Saves and restores a state of NumPy arrays, with the settings that it was trained by.

    The state is whole on every device and every host, so one process writes it and another count of
    devices, or another way to run on them, can go on from it.
    """

    def __init__(self, folder: Path, *, create: bool) -> None:
        """Those in `folder`. `create`: it is a new run's; otherwise a run has to be there."""
        self._folder = folder
        path = (folder / CHECKPOINTS).absolute()
        if create:
            make_folder(path)
        elif not path.is_dir():
            raise UsageError(f"--resume: {folder} holds no checkpoint")
        # This process alone takes part, though there may be more: no barrier, no shared disk needed.
        one = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=False, multiprocessing_options=one)
        self._manager = ocp.CheckpointManager(path, options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, settings: dict[str, Any], data: Any = None) -> None:
        """Saves the state after `step` steps, while training goes on; once is enough.

        A half-written checkpoint does not count. `data`: the state of what reads the data, if it has one.
        """
        if step != self.latest_step():
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                settings=ocp.args.JsonSave(settings),
                data=ocp.args.JsonSave(data),
            )
            with self._writing():
                self._manager.save(step, args=items)

    def restore(self, like: Any, settings: dict[str, Any]) -> tuple[int, Any, Any]:
        """The latest checkpoint: its step, its state in the structure of `like`, and the state of the data.

        Raises:
          UsageError: there is none, or it was trained by other settings and going on would mix two runs.
        """
        step = self.latest_step()
        if step is None:
            raise UsageError(f"--resume: {self._folder} holds no checkpoint")
        json_items = ocp.args.Composite(settings=ocp.args.JsonRestore(), data=ocp.args.JsonRestore())
        saved = self._manager.restore(step, args=json_items)
        check_same(saved["settings"], json.loads(json.dumps(settings)))
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return step, self._manager.restore(step, args=items)["state"], saved["data"]

    def close(self) -> None:
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What failed in the background, such as on a full disk, is raised by the next save or by close."""
        try:
            yield
        except Exception as error:  # Orbax has many, and those of the storage beneath it
            reason = str(error).partition("\n")[0]
            raise UsageError(f"{self._folder}: a checkpoint cannot be written: {reason}") from error


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot be made: {error.strerror}") from None


def check_same(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises UsageError unless a resumed run is given the settings that it began with."""
    changed = [name for name in given if saved.get(name) != given[name]]
    if changed:
        was = ", ".join(f"{name} {saved.get(name)}" for name in changed)
        now = ", ".join(f"{name} {given[name]}" for name in changed)
        raise UsageError(f"--resume: the run began with {was}, and is now given {now}")
