"""A progress bar, and a Ctrl-C that lets the step in progress end."""

import signal
import sys
from types import FrameType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Rate(ProgressColumn):
    """Images per second, once it is known."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} images/s")


class ProgressBar:
    """Counts images, with their rate and the loss; none in a log, where every refresh would be a line."""

    def __init__(self, description: str, total: int, *, done: int = 0, visible: bool = True) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,  # it would print to stderr
            disable=not (visible and sys.stderr.isatty()),
        )
        self._task = self._progress.add_task(description, total=total, completed=done, loss="")

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, images: int) -> None:
        self._progress.advance(self._task, images)

    def show_loss(self, loss: float) -> None:
        self._progress.update(self._task, loss=f"loss {loss:.3g}")


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM, which clusters send) into a flag; a second one acts at once.

    An exception raised in the middle of a step would find the state donated to the device and not yet back.
    """

    def __init__(self) -> None:
        self.requested = False
        self.number = signal.SIGTERM  # where it is another process that was asked
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        self.requested, self.number = True, signal.Signals(number)
        signal.signal(number, self._previous[number])
