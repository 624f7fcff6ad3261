"""A progress bar, and a Ctrl-C that lets the step in progress end."""

import signal
import sys
from types import FrameType

from tqdm import tqdm


def progress_bar(description: str, total: int, *, done: int = 0, visible: bool = True) -> tqdm:
    """A bar that counts images and shows their rate; rarely refreshed where that is a line of a log."""
    return tqdm(
        desc=description,
        total=total,
        initial=done,
        disable=not visible,
        unit=" images",
        leave=False,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM, which clusters send) into a flag; a second one acts at once.

    An exception raised in the middle of a step would find the state donated to the device and not yet back.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._previous[number])
