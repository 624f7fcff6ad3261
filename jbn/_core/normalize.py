"""Normalization by the statistics of the batch, or of groups of it, and its one derivative rule.

Everything here works on arrays of x's rank: statistics and parameters are 1 along the reduced axes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from jbn._core import xla
from jbn._core.activation import DerivativeForm
from jbn._core.affine import Inputs, NormConfig, affine, epilogue
from jbn._core.devices import Reduction
from jbn._core.dtypes import compute_dtype
from jbn._core.renorm import RenormReference, renormalized
from jbn._core.shift import center
from jbn._core.statistics import (
    ShiftedMoments,
    global_means,
    inverse_std,
    measure,
    merge_across_devices,
    merge_shifted,
    real_product,
    static_count,
)
from jbn._core.types import X
from jbn._core.weights import apply_weights, freeze_masked, zero_masked, zero_masked_overflow

MOMENTS_NAME = "jbn_moments"
"""For `jax.checkpoint`: the moments of x, behind the collectives."""


class RunningHints(NamedTuple):
    """What the running statistics tell before the batch is seen, of x's rank; None is nothing."""

    reference: RenormReference | None
    shift_hint: Array | None


def normalize(config: NormConfig, inputs: Inputs, hints: RunningHints) -> tuple[Array, ShiftedMoments]:
    """y = scale * (x - mean) / sqrt(var + epsilon) + bias by the moments of the batch, and those moments.

    The mean is in two parts, and x - shift is taken first: rounding the mean to one float32 would cost half
    an ulp of the mean in y, 5e-4 at N(1e4, 1). What is left, delta, is of the size of the deviation, and
    goes into the constant that is added in the end.

    Entries that take no part come out normalized like the others, as constants: no gradient enters or
    leaves through them. If they hold NaN or inf they count as 0, so that y is finite.

    It is one jitted call: layers that are alike are traced, differentiated, transposed and lowered once, and
    outside of jit it is one program and not a hundred. It is none where an axis name is bound: JAX would run
    the staged call when the name no longer is.
    """
    normalized: tuple[Array, ShiftedMoments]
    if config.reduction.axis_name is not None:
        normalized = _normalize(config, inputs, hints)
    else:
        first, others = xla.in_order_of_gradients(inputs._asdict(), inputs.x)
        normalized = _compiled_normalize(config, first, others, hints)
    return normalized


def normalize_groups(
    config: NormConfig, inputs: Inputs, hints: RunningHints, size: int
) -> tuple[Array, ShiftedMoments]:
    """`normalize` for each ghost batch, of `size` successive examples; the moments are those of all rows.

    Examples [N] become [N / size, size]: the second axis is reduced, and the first is not. Groups do
    not know of other devices; only the moments, which are for the running statistics, are pooled over them.
    """
    whole = config.reduction
    batch, shape = whole.axes[0], inputs.x.shape
    groups = shape[batch] // size or 1  # a batch of no examples is one group of none

    def split(value: Array) -> Array:
        is_shared = value.shape[batch] == 1 and shape[batch] != 1
        examples = (1, 1) if is_shared else (groups, shape[batch] // groups)
        return jnp.reshape(value, (*value.shape[:batch], *examples, *value.shape[batch + 1 :]))

    within = dataclasses.replace(config, reduction=Reduction(tuple(axis + 1 for axis in whole.axes)))
    inputs, shift_hint = jax.tree.map(split, (inputs, hints.shift_hint))
    reference = hints.reference
    if reference is not None:
        reference = reference._replace(mean=split(reference.mean), var=split(reference.var))
    y, measured = normalize(within, inputs, RunningHints(reference, shift_hint))
    parts = ShiftedMoments(*(jnp.moveaxis(part, batch, 0) for part in measured))
    pooled: ShiftedMoments = merge_shifted(parts)
    return jnp.reshape(y, shape), pooled if whole.axis_name is None else merge_across_devices(pooled, whole)


def _normalize(config: NormConfig, inputs: Inputs, hints: RunningHints) -> tuple[Array, ShiftedMoments]:
    """Measures, and normalizes by what was measured.

    The moments are measured before the derivative rule's function and not in it, and have a name: a backward
    pass that wants y again need not measure again. That function's rule says all of how y moves with x. What
    is measured keeps a derivative all the same: JAX drops the rule where it differentiates a scan twice.
    """
    measured = measure(inputs.x, inputs.weights, config.reduction, hints.shift_hint)
    measured = jax.tree.map(lambda part: checkpoint_name(part, MOMENTS_NAME), measured)
    normalized: tuple[Array, ShiftedMoments] = _normalize_by(config, inputs, hints.reference, measured)
    return normalized


@functools.partial(jax.jit, static_argnums=0)
def _compiled_normalize(
    config: NormConfig, first: dict[str, Any], others: dict[str, Any], hints: RunningHints
) -> tuple[Array, ShiftedMoments]:
    normalized: tuple[Array, ShiftedMoments] = _normalize(config, Inputs(**first, **others), hints)
    return normalized


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize_by(
    config: NormConfig, inputs: Inputs, reference: RenormReference | None, measured: ShiftedMoments
) -> tuple[Array, ShiftedMoments]:
    """y by these moments of x, and the moments."""
    scale, bias = renormalized(config.epsilon, measured, reference, inputs.scale, inputs.bias)
    y = _normalized(config, inputs._replace(scale=scale, bias=bias), measured)
    return epilogue(y, inputs.residual, config.activation), measured


@_normalize_by.defjvp
def _normalize_by_jvp(
    config: NormConfig,
    primals: tuple[Inputs, RenormReference | None, ShiftedMoments],
    tangents: tuple[Inputs, RenormReference | None, ShiftedMoments],
) -> tuple[tuple[Array, ShiftedMoments], tuple[Array, ShiftedMoments]]:
    """The one rule; forward mode, reverse mode and all orders come from it, collectives included.

        y_dot = a x_dot + (bias_dot - a E[x_dot]) + (x - mean) (r scale_dot - a r^2 E[(x - mean) x_dot])
        with r = 1 / sqrt(var + epsilon) and a = scale r

    - Both expectations travel in one collective. Transposed, they are the two reductions of the backward
      pass, and again one collective.
    - The tangents are in a checkpoint, so that the backward pass keeps x in its own dtype and per-channel
      vectors, and computes x - mean again. Nothing could be shared with the forward pass that XLA would not
      have to store, so there is nothing to prevent it from sharing. A collective has to stand between two
      checkpoints: inside of one, JAX would ask for the axis when it is no longer bound. Without one there is
      one: each keeps a copy of x of its own where the caller's `jax.checkpoint` is around.
    - relu needs no mask to be kept: where it passes, y is positive. With a residual that is seen from y,
      which the next layer keeps anyway; without one it is computed again from x. The derivative of other
      activations is computed again from x, and from the residual where there is one.
    - The moments have tangents too. Their first use is the second derivative: this rule, differentiated,
      asks how they move with x.
    """
    (inputs, reference, measured), (tangent, *_) = primals, tangents
    y, measured = _normalize_by(config, inputs, reference, measured)
    # From here on scale and bias have the correction of renorm in them: scale * r and bias + scale * d.
    corrected = functools.partial(renormalized, config.epsilon, measured, reference)
    (scale, bias), (scale_dot, bias_dot) = jax.jvp(
        corrected, (inputs.scale, inputs.bias), (tangent.scale, tangent.bias)
    )
    inputs = inputs._replace(scale=scale, bias=bias)
    tangent = tangent._replace(weights=None, scale=scale_dot, bias=bias_dot)
    relu_output = None
    if config.derivative_form in (None, DerivativeForm.RELU):
        inputs = inputs._replace(residual=None)
        if tangent.residual is not None and config.derivative_form is not None:
            relu_output = y
    checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)
    if config.reduction.axis_name is None:
        tangents_of = checkpoint(functools.partial(_tangents, config, lambda function: function))
    else:
        tangents_of = functools.partial(_tangents, config, checkpoint)
    y_dot, mean_dot, var_dot = tangents_of(inputs, measured, relu_output, tangent)
    constant = jax.tree.map(jnp.zeros_like, measured)
    return (y, measured), (y_dot, constant._replace(delta=mean_dot, var=var_dot))


def _normalized(config: NormConfig, inputs: Inputs, measured: ShiftedMoments) -> Array:
    """y before residual and activation."""
    x, weights, scale, bias, _ = inputs
    offset = freeze_masked(x, weights).astype(measured.shift.dtype) - measured.shift
    if weights is not None:  # no variance, no scale: what a masked entry holds could become anything
        offset = jnp.where(measured.num_valid > 1, offset, jnp.zeros_like(offset))
    return zero_masked_overflow(affine(offset, measured.delta, measured.var, scale, bias, config), weights)


def _tangents(
    config: NormConfig,
    checkpoint: Callable[[Any], Any],
    inputs: Inputs,
    measured: ShiftedMoments,
    relu_output: Array | None,
    tangent: Inputs,
) -> tuple[Array, Array, Array]:
    """The tangents of y, mean and var, with a checkpoint before and one behind the collective."""
    sums_of = checkpoint(functools.partial(_tangent_sums, config))
    sums = sums_of(inputs.x, inputs.weights, measured, tangent.x)
    # In `measured` the count of rows is an array; where it is static, a constant needs no operation.
    rows = static_count(inputs.x, inputs.weights, config.reduction.axes)
    weight = measured.weight if rows is None else measured.weight.dtype.type(rows * config.reduction.size)
    means = global_means(sums, weight, config.reduction)
    from_means = checkpoint(functools.partial(_tangents_from_means, config))
    tangents: tuple[Array, Array, Array] = from_means(inputs, measured, relu_output, means, tangent)
    return tangents


def _tangent_sums(
    config: NormConfig, x: X, weights: Array | None, measured: ShiftedMoments, x_dot: Array
) -> Array:
    """sum(x_dot) and sum((x - mean) x_dot) over this device's rows, stacked.

    The second is sum((x - shift) x_dot) - delta sum(x_dot): delta is taken out where it costs nothing.
    """
    offset = center(x, measured.shift, weights)
    x_dot = zero_masked(x_dot.astype(measured.shift.dtype), weights)
    values, products = apply_weights(x_dot, weights), apply_weights(real_product(offset, x_dot), weights)
    first, second = xla.plain_sum_pair(values, products, config.reduction.axes)
    return jnp.stack([first, (second - real_product(measured.delta, first)).astype(first.dtype)])


def _tangents_from_means(
    config: NormConfig,
    inputs: Inputs,
    measured: ShiftedMoments,
    relu_output: Array | None,
    means: Array,
    tangent: Inputs,
) -> tuple[Array, Array, Array]:
    """The tangents of y, mean and var, from E[x_dot] and E[(x - mean) x_dot].

    What the backward pass does with the cotangent of an activation or a mask, it does several times: sums,
    and dx. As one expression XLA would store it, so each has its own, as the `DerivativeForm` says. With a
    residual that of the activation is stored in any case, being the residual's gradient; for relu
    `relu_output` is then y, which tells where it passes.
    """
    x, weights, scale, _, _ = inputs
    _, _, scale_dot, bias_dot, residual_dot = tangent
    shift = measured.shift
    offset = center(x, shift, weights, xla.DifferenceUse.GRADIENT)
    x_dot = zero_masked(tangent.x.astype(shift.dtype), weights)
    mean_dot, half_var_dot = means[0], means[1].real  # var_dot = 2 E[(x - mean) x_dot]
    r = inverse_std(measured.var, config.epsilon)  # r_dot = -r^3 var_dot / 2
    dtype = compute_dtype(*(part.dtype for part in (shift, scale, bias_dot) if part is not None))
    a = r.astype(dtype) if scale is None else scale.astype(dtype) * r.astype(dtype)  # a = scale r
    constant = -a * mean_dot.astype(dtype)  # bias_dot - a mean_dot
    if bias_dot is not None:
        constant = bias_dot.astype(dtype) + constant
    slope = -a * (r * r * half_var_dot).astype(dtype)  # a_dot = scale_dot r + scale r_dot
    if scale_dot is not None:
        slope = r.astype(dtype) * scale_dot.astype(dtype) + slope
    constant = constant - measured.delta.astype(dtype) * slope  # x - mean = offset - delta
    terms = (a * x_dot.astype(dtype), constant, slope, offset.astype(dtype))
    tangent_of_y = functools.partial(_tangent_of_y, config, inputs, measured, *terms)
    form = config.derivative_form if residual_dot is None else None
    if form in (DerivativeForm.REPEATED, DerivativeForm.REPEATED_WIDE):
        y_dot = xla.unless_on_cpu(tangent_of_y, form, DerivativeForm.STORED)
    else:
        y_dot = tangent_of_y(form)
    if residual_dot is not None:
        y_dot = y_dot + residual_dot.astype(config.dtype)
    if inputs.residual is not None:
        y_dot = y_dot * _activation_derivative(config, inputs, measured, config.dtype)
    if relu_output is not None:
        y_dot = jnp.where(xla.read_again(relu_output) > 0, y_dot, jnp.zeros_like(y_dot))
    return y_dot, mean_dot, 2 * half_var_dot


def _tangent_of_y(
    config: NormConfig,
    inputs: Inputs,
    measured: ShiftedMoments,
    x_dot_term: Array,
    constant: Array,
    slope: Array,
    offset: Array,
    form: DerivativeForm | None,
) -> Array:
    """f'(y) (x_dot_term + constant + slope * offset), and 0 for entries that take no part."""
    if form in (DerivativeForm.REPEATED, DerivativeForm.REPEATED_WIDE):
        within = config
        if form is DerivativeForm.REPEATED_WIDE:
            within = dataclasses.replace(config, dtype=compute_dtype(config.dtype, measured.var.dtype))
        derivative = functools.partial(_activation_derivative, within, inputs, measured, offset.dtype)
        x_dot_term = derivative(1) * x_dot_term
        affine_term = derivative(2) * constant + derivative(3) * (slope * offset)
    else:
        affine_term = xla.broadcast_affine(inputs.x, constant, slope, offset, config.reduction.axes)
    if form is DerivativeForm.RELU:
        # What is masked is set to 0 below, and without weights y is simple enough not to be stored.
        y = _normalized(config, inputs._replace(weights=None), measured)
        x_dot_term, affine_term = xla.both_where_positive(y, x_dot_term, affine_term)
    y_dot = zero_masked(x_dot_term, inputs.weights) + xla.zero_masked_apart(affine_term, inputs.weights)
    y_dot = y_dot.astype(config.dtype)
    if form is DerivativeForm.STORED:
        y_dot = y_dot * _activation_derivative(config, inputs, measured, config.dtype)
    return y_dot


def _activation_derivative(
    config: NormConfig, inputs: Inputs, measured: ShiftedMoments, dtype: np.dtype, use: int = 0
) -> Array:
    """f'(y + residual) of the activation f, from x again; each `use` is an expression of its own."""
    assert config.activation is not None
    front = tuple(range(use))
    inputs, measured = jax.tree.map(lambda part: jnp.expand_dims(part, front), (inputs, measured))
    before = epilogue(_normalized(config, inputs, measured), inputs.residual, None)
    derivative = config.activation.derivative(before).astype(dtype)
    if inputs.residual is None:  # a masked entry may hold what is NaN here, and NaN times 0 is NaN
        derivative = zero_masked(derivative, inputs.weights)
    return lax.squeeze(derivative, front)
