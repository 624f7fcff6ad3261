"""Mistakes that a user can put right end a program with one line, not with a traceback."""

import contextlib
import signal
import sys
from collections.abc import Iterator


class UsageError(Exception):
    """A file, an option or a folder that does not fit. The text is one line and names the culprit."""


class Interrupted(Exception):
    """The user or the cluster stopped the run, by a signal. The text says what was kept."""

    def __init__(self, text: str, number: signal.Signals) -> None:
        super().__init__(text)
        self.status = 128 + number


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line on stderr; exit status 1 for a mistake.

    After Ctrl-C it is 130, after SIGTERM 143, as in shells.
    """
    try:
        yield
    except UsageError as error:
        sys.exit(f"error: {error}")
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
