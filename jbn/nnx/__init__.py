"""The layer for Flax NNX."""

from jbn.nnx._layer import BatchMoments as BatchMoments
from jbn.nnx._layer import BatchNorm as BatchNorm
from jbn.nnx._replace import keep_batch_moments as keep_batch_moments
from jbn.nnx._replace import replace_batch_norm as replace_batch_norm

__all__ = ["BatchMoments", "BatchNorm", "keep_batch_moments", "replace_batch_norm"]
