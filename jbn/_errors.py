"""What is wrong with a call, in four parts.

The builder `error` makes every text: which argument of which call, what came, what was expected, how to
mend it. A layer puts its own name and path in the place of the core's, around the call into the core.
"""

import contextlib
from collections.abc import Iterator


class ArgumentError(ValueError):
    """An argument that jbn cannot work with: which call, and what is wrong."""

    def __str__(self) -> str:
        return ": ".join(self.args)


class UnboundAxisError(ArgumentError, NameError):
    """An `axis_name` that nothing around the call binds; JAX and Flax raise `NameError` for it."""


def error(
    call: str, argument: str, got: str, expected: str, fix: str, kind: type[ArgumentError] = ArgumentError
) -> ArgumentError:
    """The one builder of error texts."""
    return kind(f"jbn.{call}", f"{argument} is {got}. Expected {expected}. {fix}")


@contextlib.contextmanager
def naming(call: str) -> Iterator[None]:
    """Errors inside are those of this call, for the user knows no other; also a decorator."""
    try:
        yield
    except ArgumentError as caught:
        raise type(caught)(call, *caught.args[1:]) from None
