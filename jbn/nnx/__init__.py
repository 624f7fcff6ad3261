"""The layer for Flax NNX."""

from jbn.nnx._layer import BatchNorm as BatchNorm
from jbn.nnx._models import keep_batch_moments as keep_batch_moments
from jbn.nnx._models import replace_batch_norm as replace_batch_norm
from jbn.nnx._moments import BatchMoments as BatchMoments

__all__ = ["BatchMoments", "BatchNorm", "keep_batch_moments", "replace_batch_norm"]
