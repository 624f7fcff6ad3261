"""What a case needs of JAX: the one way in which tests say that an older JAX cannot do it."""

import re

import jax
import pytest


def before(version, library=jax):
    """Whether this JAX, or another library, is older than that."""
    here, that = (tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (library.__version__, version))
    return here < that


def needs_jax(version, reason, raises=None):
    """The mark of a case that fails before this JAX, with this error; without one it is skipped there."""
    reason = f"JAX before {version}: {reason}"
    if raises is None:
        return pytest.mark.skipif(before(version), reason=reason)
    return pytest.mark.xfail(before(version), reason=reason, raises=raises, strict=True)
