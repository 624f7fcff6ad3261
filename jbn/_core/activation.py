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
# Those that keep the shape of what they mix; others show by the shapes.
_MIXING = """
all_gather all_to_all cumlogsumexp cummax cummin cumprod cumsum dynamic_update_slice fft pmax pmin ppermute
psum psum_invariant random_bits reduce_scatter rev rng_uniform sort
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
        # A function with a `custom_vjp` has no forward mode; it is one of the STORED.
        (diagonal,) = jax.vjp(self.function, y)[1](ones)
        return diagonal


def activation_of(function: Function, traced: ClosedJaxpr) -> Activation:
    """The function, or one of the same values that XLA makes into less traffic, and a form that suits it."""
    if _is_gelu(function):
        return Activation(gelu, DerivativeForm.REPEATED)
    operations = {equation.primitive.name for equation in _all_equations(traced.jaxpr)}
    cheap, dear = set(_CHEAP.split()), set(_DEAR.split())
    if operations <= cheap:
        return Activation(function, DerivativeForm.REPEATED)
    if operations <= cheap | dear:
        return Activation(function, DerivativeForm.REPEATED_WIDE)
    return Activation(function, DerivativeForm.STORED)


def trace(function: Function, dtype: np.dtype) -> tuple[ClosedJaxpr, Any]:
    """What the function does to an array of that dtype: its operations, and the shape of what comes out."""
    probe = jax.ShapeDtypeStruct(_PROBE, dtype)
    traced: tuple[ClosedJaxpr, Any] = jax.make_jaxpr(function, return_shape=True)(probe)
    return traced


def keeps_shape(result: Any, dtype: np.dtype) -> bool:
    """Whether what came out is one array like the one that went in."""
    return getattr(result, "shape", None) == _PROBE and result.dtype == dtype


def first_mixing(traced: ClosedJaxpr) -> str | None:
    """The first operation by which an entry may depend on other entries, or on where it stands."""
    return next((e.primitive.name for e in _all_equations(traced.jaxpr) if _mixes(e)), None)


def _mixes(equation: JaxprEqn) -> bool:
    """Whether it is known to mix, takes entries away from their places, or puts them there from elsewhere."""
    name = equation.primitive.name
    if name in _MIXING.split() or name.startswith(_MIXING_KINDS):
        return True
    inputs, outputs = _shapes(equation.invars), _shapes(equation.outvars)
    inner = [_shapes(jaxpr.invars) for jaxpr in _inner(equation)]
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
    if not isinstance(function, functools.partial):
        return function
    args = tuple((type(value), value) for value in function.args)
    keywords = tuple((name, type(value), value) for name, value in sorted(function.keywords.items()))
    try:
        return _partial(function.func, args, keywords)
    except TypeError:  # it holds what has no hash
        return function


@functools.lru_cache
def _partial(function: Function, args: tuple[Any, ...], keywords: tuple[Any, ...]) -> Function:
    values = {name: value for name, _, value in keywords}
    return functools.partial(function, *(value for _, value in args), **values)


RELU = Activation(jax.nn.relu, DerivativeForm.RELU)
