"""A progress bar, and a Ctrl-C that lets the step in progress end."""

import signal
from types import FrameType

from tqdm import tqdm


def progress_bar(description: str, total: int, *, done: int = 0, visible: bool = True) -> tqdm:
    """A bar that counts images and shows their rate; none in a log, where every refresh would be a line."""
    return tqdm(
        desc=description,
        total=total,
        initial=done,
        disable=None if visible else True,  # None: shown where stderr is a terminal
        unit=" images",
        leave=False,
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
