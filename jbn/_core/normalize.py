"""The normalization itself, and its one derivative rule.

Everything here works on arrays of x's rank: statistics and parameters are 1 along the reduced axes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jbn._core.affine import Inputs, Normalization, affine, finished, finite, settled
from jbn._core.dtypes import X, working
from jbn._core.renorm import Reference, renormalized
from jbn._core.shift import Use, centre, weighted, zeroed
from jbn._core.statistics import Measured, dot, expectations, inverse_deviation, known_rows, measure
from jbn._core.xla import plain_sums, spread


def normalize(
    config: Normalization, inputs: Inputs, reference: Reference | None, guess: Array | None
) -> tuple[Array, Measured]:
    """y = scale * (x - mean) / sqrt(var + epsilon) + bias by the moments of the batch, and those moments.

    The mean is in two parts, and x - shift is taken first: rounding the mean to one float32 would cost half
    an ulp of the mean in y, 5e-4 at N(1e4, 1). What is left, the rest, is of the size of the deviation, and
    goes into the constant that is added in the end.

    Entries that take no part come out normalized like the others, as constants: no gradient enters or
    leaves through them. If they hold NaN or inf they count as 0, so that y is finite.

    It is one jitted call: of layers that are alike, one is traced, differentiated, transposed and lowered,
    and outside of jit it is one program and not a hundred. Not where an axis name is bound: JAX runs what it
    has staged there when the name no longer is.
    """
    normalized: tuple[Array, Measured]
    if config.reduction.axis_name is not None:
        normalized = _normalize(config, inputs, reference, guess)
    else:
        # The first argument has the first gradient, and that decides which sums XLA for GPUs puts into one
        # kernel where two layers share a gradient: by count 1 % of a ResNet-50's traffic, for either dtype.
        values = inputs._asdict()
        first = "x" if inputs.x.dtype.itemsize < 4 else "scale"
        normalized = _compiled_normalize(config, {first: values.pop(first)}, values, reference, guess)
    return normalized


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize(
    config: Normalization, inputs: Inputs, reference: Reference | None, guess: Array | None
) -> tuple[Array, Measured]:
    measured = measure(inputs.x, inputs.weights, config.reduction, guess)
    scale, bias = renormalized(config.epsilon, measured, reference, inputs.scale, inputs.bias)
    y = _normalized(config, inputs._replace(scale=scale, bias=bias), measured)
    return finished(y, inputs.residual, config), measured


@functools.partial(jax.jit, static_argnums=0)
def _compiled_normalize(
    config: Normalization,
    first: dict[str, Any],
    others: dict[str, Any],
    reference: Reference | None,
    guess: Array | None,
) -> tuple[Array, Measured]:
    normalized: tuple[Array, Measured] = _normalize(config, Inputs(**first, **others), reference, guess)
    return normalized


@_normalize.defjvp
def _normalize_jvp(
    config: Normalization,
    primals: tuple[Inputs, Reference | None, Array | None],
    tangents: tuple[Inputs, Reference | None, Array | None],
) -> tuple[tuple[Array, Measured], tuple[Array, Measured]]:
    """The one rule; forward mode, reverse mode and all orders come from it, collectives included.

        y_dot = a x_dot + (bias_dot - a E[x_dot]) + (x - mean) (r scale_dot - a r^2 E[(x - mean) x_dot])
        with r = 1 / sqrt(var + epsilon) and a = scale r

    - Both expectations travel in one collective. Transposed, they are the two reductions of the backward
      pass, and again one collective. It stands between two checkpoints: inside of one, JAX would ask for the
      axis when it is no longer bound.
    - The rest is in checkpoints, so that the backward pass keeps x in its own dtype and per-channel vectors,
      and computes x - mean again. Nothing could be shared with the forward pass that XLA would not
      have to store, so there is nothing to prevent it from sharing.
    - relu needs no mask to be kept: where it passes, y is positive. With a residual that is seen from y,
      which the layer behind keeps anyway; without one it is computed again from x.
    - The moments have tangents too. Their first use is the second derivative: this rule, differentiated,
      asks how they move with x.
    """
    (inputs, reference, guess), (tangent, *_) = primals, tangents
    y, measured = _normalize(config, inputs, reference, guess)
    affine_of = functools.partial(renormalized, config.epsilon, measured, reference)
    (scale, bias), (tangent_scale, tangent_bias) = jax.jvp(
        affine_of, (inputs.scale, inputs.bias), (tangent.scale, tangent.bias)
    )
    inputs = inputs._replace(scale=scale, bias=bias, residual=None)
    tangent = tangent._replace(scale=tangent_scale, bias=tangent_bias)
    checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)
    tangent_sums = checkpoint(functools.partial(_tangent_sums, config))
    tangent_of = checkpoint(functools.partial(_tangent, config))
    local = tangent_sums(inputs.x, inputs.weights, measured, tangent.x)
    # What was known when x was measured is an array in `measured`; it is known here too.
    rows = known_rows(inputs.x, inputs.weights, config.reduction.axes)
    total = measured.total if rows is None else measured.total.dtype.type(rows * config.reduction.size)
    means = expectations(local, total, config.reduction)
    positive = None if tangent.residual is None or config.activation is None else y
    y_dot, mean_dot, var_dot = tangent_of(inputs, measured, positive, means, tangent._replace(weights=None))
    still = jax.tree.map(jnp.zeros_like, measured)
    return (y, measured), (y_dot, still._replace(rest=mean_dot, var=var_dot))


def _normalized(config: Normalization, inputs: Inputs, measured: Measured) -> Array:
    """y before residual and activation."""
    x, weights, scale, bias, _ = inputs
    offset = settled(x, weights).astype(measured.shift.dtype) - measured.shift
    if weights is not None:  # no variance, no scale: what a masked entry holds could become anything
        offset = jnp.where(measured.values > 1, offset, jnp.zeros_like(offset))
    return finite(affine(offset, measured.rest, measured.var, scale, bias, config), weights)


def _tangent_sums(
    config: Normalization, x: X, weights: Array | None, measured: Measured, x_dot: Array
) -> Array:
    """Of x_dot and of (x - mean) x_dot, on this device: the rest of the mean where it costs nothing."""
    offset, x_dot = centre(x, measured.shift, weights), zeroed(x_dot.astype(measured.shift.dtype), weights)
    values, products = weighted(x_dot, weights), weighted(dot(offset, x_dot), weights)
    first, second = plain_sums(values, products, config.reduction.axes)
    return jnp.stack([first, (second - dot(measured.rest, first)).astype(first.dtype)])


def _tangent(
    config: Normalization,
    inputs: Inputs,
    measured: Measured,
    positive: Array | None,
    means: Array,
    tangent: Inputs,
) -> tuple[Array, Array, Array]:
    """The tangents of y, mean and var; `positive` is y, where relu passes and that cannot be had from x.

    What the backward pass does with the cotangent of relu, it does twice: sums, and dx. As one expression XLA
    would store it, so without a residual each has its own: `y > 0`, and not `y <= 0`. With a residual it is
    stored in any case, being the residual's gradient; the barrier keeps XLA from computing y again from x and
    residual, which are two reads instead of one.
    """
    x, weights, scale, _, _ = inputs
    _, _, scale_dot, bias_dot, residual_dot = tangent
    shift = measured.shift
    offset, x_dot = centre(x, shift, weights, Use.GRADIENT), zeroed(tangent.x.astype(shift.dtype), weights)
    mean_dot, half_var_dot = means[0], means[1].real
    r = inverse_deviation(measured.var, config.epsilon)
    kind = working(*(part.dtype for part in (shift, scale, bias_dot) if part is not None))
    a = r.astype(kind) if scale is None else scale.astype(kind) * r.astype(kind)
    constant = -a * mean_dot.astype(kind)
    if bias_dot is not None:
        constant = bias_dot.astype(kind) + constant
    slope = -a * (r * r * half_var_dot).astype(kind)
    if scale_dot is not None:
        slope = r.astype(kind) * scale_dot.astype(kind) + slope
    constant = constant - measured.rest.astype(kind) * slope
    own = a * x_dot.astype(kind)
    shared = spread(x, constant, slope, offset.astype(kind), config.reduction.axes)
    if config.activation is not None and residual_dot is None:
        y = _normalized(config, inputs, measured)
        own = jnp.where(y <= 0, jnp.zeros_like(own), own)
        shared = jnp.where(y > 0, shared, jnp.zeros_like(shared))
    y_dot = zeroed(own + shared, weights).astype(config.dtype)
    if residual_dot is not None:
        y_dot = y_dot + residual_dot.astype(config.dtype)
    if positive is not None:
        y_dot = jnp.where(lax.optimization_barrier(positive) > 0, y_dot, jnp.zeros_like(y_dot))
    return y_dot, mean_dot, 2 * half_var_dot
