"""What a case needs of JAX: the one way in which tests say that an older JAX cannot do it."""

import jax
import pytest


def before(version):
    """Whether this JAX is older than that."""
    return jax.__version_info__ < tuple(map(int, version.split(".")))


def needs_jax(version, reason, raises=None):
    """The mark of a case that fails before this JAX, with this error; without one it is skipped there."""
    reason = f"JAX before {version}: {reason}"
    if raises is None:
        return pytest.mark.skipif(before(version), reason=reason)
    return pytest.mark.xfail(before(version), reason=reason, raises=raises, strict=True)
