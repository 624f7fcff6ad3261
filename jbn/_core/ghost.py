"""Ghost batches: groups of examples of one batch that are normalized each by itself."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jbn._core.affine import Inputs, Normalization
from jbn._core.devices import Reduction
from jbn._core.normalize import normalize
from jbn._core.renorm import Reference
from jbn._core.statistics import Measured, merge_measured, over_devices


def normalize_groups(
    config: Normalization, inputs: Inputs, reference: Reference | None, guess: Array | None, size: int
) -> tuple[Array, Measured]:
    """`normalize` for each group of so many successive examples; the moments are those of the whole batch.

    Examples [N] become [N / size, size], of which the second axis is reduced and the first is not. Groups do
    not know of other devices; only the moments, which are for remembering, are pooled over them.
    """
    whole = config.reduction
    batch, shape = whole.axes[0], inputs.x.shape
    groups = shape[batch] // size or 1  # a batch of no examples is one group of none

    def cut(value: Array) -> Array:
        of_all = value.shape[batch] == 1 and shape[batch] != 1
        examples = (1, 1) if of_all else (groups, shape[batch] // groups)
        return jnp.reshape(value, (*value.shape[:batch], *examples, *value.shape[batch + 1 :]))

    within = dataclasses.replace(config, reduction=Reduction(tuple(axis + 1 for axis in whole.axes)))
    if reference is not None:
        reference = reference._replace(mean=cut(reference.mean), var=cut(reference.var))
    inputs, guess = jax.tree.map(cut, (inputs, guess))
    y, measured = normalize(within, inputs, reference, guess)
    parts = Measured(*(jnp.moveaxis(part, batch, 0) for part in measured))
    pooled: Measured = merge_measured(parts)
    return jnp.reshape(y, shape), pooled if whole.axis_name is None else over_devices(pooled, whole)
