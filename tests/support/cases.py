"""One table of configurations; every property is tested on all of it."""

import contextlib
import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """An input and how it is normalized. Inputs are NumPy arrays of explicit dtype, the same on every run."""

    name: str
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    dtype: type = np.float32
    mask: str | None = None
    use_scale: bool = True
    use_bias: bool = True
    epsilon: float = 1e-5
    momentum: float = 0.9
    location: float = 0.5
    spread: float = 2.0

    def rng(self):
        return np.random.default_rng(zlib.crc32(self.name.encode()))

    @property
    def features(self):
        axes = sorted(a % len(self.shape) for a in np.atleast_1d(self.axis))
        return tuple(self.shape[a] for a in axes)

    @property
    def settings(self):
        """Keyword arguments of `jbn.batch_norm`, the mask included."""
        return {
            "axis": self.axis,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "mask": self.make_mask(),
        }

    def make_x(self):
        """Random values; the places that a mask takes out hold NaN and inf."""
        rng = self.rng()
        x = rng.standard_normal(self.shape)
        if np.issubdtype(self.dtype, np.complexfloating):
            x = x + 1j * rng.standard_normal(self.shape)
        x = (x * self.spread + self.location).astype(self.dtype)
        if self.mask:
            poison = np.where(rng.random(self.shape) < 0.5, np.nan, np.inf).astype(self.dtype)
            x = np.where(self.weights() > 0, x, poison)
        return x

    def make_cotangent(self):
        return np.random.default_rng(7).standard_normal(self.shape).astype(self.dtype)

    def make_params(self):
        rng = np.random.default_rng(11)
        scale = rng.uniform(0.5, 1.5, self.features).astype(np.float32)
        bias = rng.standard_normal(self.features).astype(np.float32)
        return ({"scale": scale} if self.use_scale else {}) | ({"bias": bias} if self.use_bias else {})

    def make_batch_stats(self):
        rng = np.random.default_rng(13)
        kind = np.complex64 if np.issubdtype(self.dtype, np.complexfloating) else np.float32
        return {
            "mean": rng.standard_normal(self.features).astype(kind),
            "var": rng.uniform(0.5, 1.5, self.features).astype(np.float32),
        }

    def make_mask(self):
        rng, shape = np.random.default_rng(17), self.shape
        reduced = [
            a for a in range(len(shape)) if a not in {b % len(shape) for b in np.atleast_1d(self.axis)}
        ]
        match self.mask:
            case None:
                return None
            case "examples":
                return np.arange(shape[reduced[0]]) < shape[reduced[0]] - 2
            case "steps":
                mask = rng.random([shape[a] for a in reduced[:2]]) < 0.6
            case "entries":
                mask = rng.random(shape) < 0.6
            case "channels":
                mask = rng.random([1 if a in reduced[1:] else shape[a] for a in range(len(shape))]) < 0.6
            case "weights":
                mask = rng.integers(0, 3, shape[reduced[0]]) * rng.uniform(0.25, 1, shape[reduced[0]])
                return mask.astype(np.float32)
        return mask

    def weights(self):
        from tests.support import reference

        return reference.full_weights(np.empty(self.shape), self.axis, self.make_mask())


CASES = [
    Case("vector", (32, 5)),
    Case("one feature", (16, 1)),
    Case("two rows", (2, 3)),
    Case("image", (4, 6, 5, 3)),
    Case("channels first", (4, 3, 6, 5), axis=1),
    Case("features in front", (3, 20), axis=0),
    Case("two feature axes", (8, 3, 6, 2), axis=(1, -1)),
    Case("five axes", (2, 3, 2, 4, 3), axis=-1),
    Case("one example, many pixels", (1, 8, 8, 2)),
    Case("no scale", (12, 4), use_scale=False),
    Case("no bias", (12, 4), use_bias=False),
    Case("neither", (12, 4), use_scale=False, use_bias=False),
    Case("large epsilon", (12, 4), epsilon=0.1),
    Case("no epsilon", (12, 4), epsilon=0.0),
    Case("momentum 0", (12, 4), momentum=0.0),
    Case("momentum 1", (12, 4), momentum=1.0),
    Case("far from zero", (64, 3, 3), location=1e4, spread=1.0),
    Case("bfloat16", (32, 3, 4), dtype=jnp.bfloat16),
    Case("float16", (32, 3, 4), dtype=np.float16),
    Case("float16, large", (32, 3, 4), dtype=np.float16, location=300.0, spread=100.0),
    Case("complex", (16, 3, 4), dtype=np.complex64),
    Case("masked examples", (16, 3, 4), mask="examples"),
    Case("masked examples, channels first", (16, 4, 3), axis=1, mask="examples"),
    Case("masked steps", (6, 7, 4), mask="steps"),
    Case("masked entries", (16, 3, 4), mask="entries"),
    Case("masked channels", (16, 3, 4), mask="channels"),
    Case("fractional weights", (24, 2, 4), mask="weights"),
    Case("masked bfloat16", (16, 3, 4), dtype=jnp.bfloat16, mask="examples"),
    Case("masked complex", (16, 3, 4), dtype=np.complex64, mask="examples"),
    Case("weighted complex", (16, 3, 4), dtype=np.complex64, mask="weights"),
    Case("masked, far from zero", (64, 3, 3), mask="steps", location=1e4, spread=1.0),
]
REAL = [case for case in CASES if not np.issubdtype(case.dtype, np.complexfloating)]


@contextlib.contextmanager
def loosely():
    """Implicit promotion of dtypes and ranks, which other libraries need."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def by_name(cases):
    """Arguments of `pytest.mark.parametrize` for a list of cases."""
    return {"argnames": "case", "argvalues": cases, "ids": [case.name for case in cases]}


def tolerance(dtype):
    """A few roundings of the dtype: what a value of about 1, computed in float32 or wider, may be off."""
    return 16 * max(float(jnp.finfo(dtype).eps), 2.0**-24)


def assert_close(actual, expected, tol, where=None):
    """Within tol of the largest expected value; of equal shape, and finite, both."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    assert np.iscomplexobj(actual) == np.iscomplexobj(expected)
    actual, expected = actual.astype(wide), expected.astype(wide)
    assert np.isfinite(actual).all(), "actual values are not finite"
    assert np.isfinite(expected).all(), "expected values are not finite"
    if where is not None:
        actual, expected = np.where(where, actual, 0), np.where(where, expected, 0)
    if expected.size:
        error = np.abs(actual - expected).max()
        allowed = tol * max(1.0, np.abs(expected).max())
        assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


def assert_trees_close(actual, expected, tol):
    """`assert_close` leaf by leaf, in trees of one structure."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(one, other, tol)
