"""What a case needs of JAX or Flax: the one way in which tests say that an older one cannot do it."""

import importlib.metadata

import pytest
from packaging.version import Version


def before(library, version):
    """Whether the installed one is older than that."""
    return Version(importlib.metadata.version(library)) < Version(version)


def needs(library, version, reason, raises=None):
    """The mark of a case that fails before this version, with this error; without one it is skipped there."""
    old, reason = before(library, version), f"{library} before {version}: {reason}"
    if raises is None:
        return pytest.mark.skipif(old, reason=reason)
    return pytest.mark.xfail(old, reason=reason, raises=raises, strict=True)
