"""Mistakes that a user can put right end a program with one line, not with a traceback."""

import contextlib
import sys
from collections.abc import Iterator


class UsageError(Exception):
    """A file, an option or a folder that does not fit. The text is one line and names the culprit."""


class Interrupted(Exception):
    """The user stopped the run. The text says what was kept."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line on stderr; exit status 1 for a mistake, 130 for Ctrl-C, as in shells."""
    try:
        yield
    except UsageError as error:
        sys.exit(f"error: {error}")
    except (Interrupted, KeyboardInterrupt) as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        sys.exit(130)
