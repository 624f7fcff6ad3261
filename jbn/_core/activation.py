"""Elementwise functions that follow the normalization: what is one, and how its derivative is computed."""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxtyping import Array

from jbn._core.dtypes import compute_dtype
from jbn._core.xla import gelu

Function = Callable[[Array], Array]

_PROBE = (3, 5)
"""A shape to trace a function with, which no other array in it will have by chance."""

_CHEAP = """
abs add add_any and broadcast_in_dim clamp convert_element_type copy custom_jvp_call div eq ge gt integer_pow
is_finite jit le logistic lt max min mul ne neg not or pjit select_n sign square stop_gradient sub xor
"""
_DEAR = """
acos acosh asin asinh atan atan2 atanh cbrt cos cosh exp exp2 expm1 log log1p pow rsqrt sin sinh sqrt tan tanh
"""
# Those that keep the shape of what they mix, or go by places; others show by the shapes. No list of those
# that do not mix: each version of JAX has new ones.
_MIXING = """
all_gather all_to_all approx_top_k cumlogsumexp cummax cummin cumprod cumsum dynamic_update_slice fft pad pmax
pmin ppermute psum psum_invariant random_bits random_gamma reduce_scatter rev rng_bit_generator rng_uniform
sort top_k
"""
_MIXING_KINDS = ("reduce_window", "scatter")


class DerivativeForm(enum.Enum):
    """How often f'(y) is computed, from x again; benchmarks/NOTES.md has the counts behind the choice.

    Three things are made of f'(y) dy: the two sums of the backward pass, and dx. As one expression XLA
    stores it, which takes three passes.
    """

    RELU = enum.auto()
    """Not at all: the sign of y tells."""

    REPEATED = enum.auto()
    """Once for each of the three, for functions that are cheap."""

    REPEATED_WIDE = enum.auto()
    """Likewise, for others, of y before it is rounded: the rounded one has many uses, and XLA stores it."""

    STORED = enum.auto()
    """Once, and its product with dy is stored: for what is too dear, or has loops."""

    SEPARATE = enum.auto()
    """The function is applied to y: a `custom_vjp` may do anything to dy, of which f'(y) says nothing."""


@dataclasses.dataclass(frozen=True)
class Activation:
    """An elementwise function, and the form of its derivative."""

    function: Function
    form: DerivativeForm

    def derivative(self, y: Array) -> Array:
        """f'(y), of y's shape and dtype: the Jacobian is its diagonal."""
        ones = jnp.ones_like(y)
        if self.form is DerivativeForm.REPEATED_WIDE:
            diagonal: Array = jax.jvp(self.function, (y,), (ones,))[1]
            return diagonal
        (diagonal,) = jax.vjp(self.function, y)[1](ones)
        return diagonal


def activation_of(function: Function, traced: ClosedJaxpr, dtype: np.dtype) -> Activation:
    """The function, or one of the same values that XLA makes into less traffic, and a form that suits it."""
    if _is_gelu(function):
        return Activation(gelu, DerivativeForm.REPEATED)
    operations, cheap = _operations(traced), set(_CHEAP.split())
    if any(name.startswith("custom_vjp") for name in operations):
        return Activation(function, DerivativeForm.SEPARATE)
    if cheap.issuperset(operations):
        return Activation(function, DerivativeForm.REPEATED)
    if cheap.union(_DEAR.split()).issuperset(operations) and _is_generic(function, operations, dtype):
        return Activation(function, DerivativeForm.REPEATED_WIDE)
    return Activation(function, DerivativeForm.STORED)


def _operations(traced: ClosedJaxpr) -> list[str]:
    return [equation.primitive.name for equation in _all_equations(traced.jaxpr)]


def _is_generic(function: Function, operations: list[str], dtype: np.dtype) -> bool:
    """Whether the function does the same to arrays of the dtype in which y is computed."""
    wide = compute_dtype(dtype)
    if wide == dtype:
        return True
    try:
        traced, result = trace(function, wide)
    except Exception:
        return False
    here, there = (set(names) - {"convert_element_type"} for names in (operations, _operations(traced)))
    return keeps_shape(result, wide) and here == there


def trace(function: Function, dtype: np.dtype) -> tuple[ClosedJaxpr, Any]:
    """What the function does to an array of that dtype: its operations, and the shape of what comes out."""
    probe = jax.ShapeDtypeStruct(_PROBE, dtype)
    traced: tuple[ClosedJaxpr, Any] = jax.make_jaxpr(function, return_shape=True)(probe)
    return traced


def keeps_shape(result: Any, dtype: np.dtype) -> bool:
    """Whether what came out is one array like the one that went in."""
    return getattr(result, "shape", None) == _PROBE and result.dtype == dtype


def first_mixing(function: Function, traced: ClosedJaxpr, dtype: np.dtype) -> str | None:
    """The first operation by which an entry may depend on other entries, or on where it stands."""
    looked_at = [traced]
    if "custom_jvp_call" in _operations(traced):  # its rule may do anything
        probe = jax.ShapeDtypeStruct(_PROBE, dtype)
        looked_at += [jax.make_jaxpr(lambda y, y_dot: jax.jvp(function, (y,), (y_dot,)))(probe, probe)]
    equations = (equation for each in looked_at for equation in _all_equations(each.jaxpr))
    return next((equation.primitive.name for equation in equations if _mixes(equation)), None)


def _mixes(equation: JaxprEqn) -> bool:
    """Whether it is known to mix, takes entries away from their places, or puts them there from elsewhere."""
    name, inner = equation.primitive.name, [_shapes(jaxpr.invars) for jaxpr in _inner(equation)]
    inputs, outputs = _shapes(equation.invars), _shapes(equation.outvars)
    if _PROBE in (*inputs, *outputs) and (name in _MIXING.split() or name.startswith(_MIXING_KINDS)):
        return True
    if inner:  # which is looked at by itself; a loop over rows would show there as a function of rows
        return name == "scan" and inputs.count(_PROBE) != inner[0].count(_PROBE)
    if _PROBE in inputs and set(outputs) != {_PROBE}:
        return True
    return _PROBE in outputs and not (inputs and all(map(_is_entrywise, inputs)))


def _shapes(values: Sequence[Any]) -> list[tuple[int, ...]]:
    return [getattr(value.aval, "shape", ()) for value in values]


def _is_entrywise(shape: tuple[int, ...]) -> bool:
    return shape == _PROBE or math.prod(shape) == 1


def _all_equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from _all_equations(inner)


def _inner(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The functions that an operation calls: of jit, of loops, of branches."""
    for value in equation.params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each


def _is_gelu(function: Function) -> bool:
    """Whether it is JAX's GELU in the approximation by a tanh, its default."""
    if not isinstance(function, functools.partial):
        return function is jax.nn.gelu
    arguments = (function.args, function.keywords)
    return function.func is jax.nn.gelu and arguments in (((), {"approximate": True}), ((True,), {}))


def same_partial(function: Function) -> Function:
    """One object for equal `functools.partial`s, which differ by identity: jit would compile for each."""
    is_plain = type(function) in (functools.partial, jax.tree_util.Partial)  # not what is made of them
    if not isinstance(function, functools.partial) or not is_plain:
        return function
    # By their text too: 0.0 equals -0.0, and 0.5 equals float32(0.5), which makes float32 of bfloat16.
    args = tuple((repr(value), value) for value in function.args)
    keywords = tuple((name, repr(value), value) for name, value in sorted(function.keywords.items()))
    try:
        return _partial(function.func, args, keywords)
    except TypeError:  # it holds what has no hash
        return function


@functools.lru_cache
def _partial(function: Function, args: tuple[Any, ...], keywords: tuple[Any, ...]) -> Function:
    values = {name: value for name, _, value in keywords}
    return functools.partial(function, *(value for _, value in args), **values)


def _relu(y: Array) -> Array:
    """Looked up at each call: exporters put a function of their own in its place while they trace."""
    return jax.nn.relu(y)


RELU = Activation(_relu, DerivativeForm.RELU)
