"""The layer for Flax linen."""

from jbn.linen._layer import BatchNorm as BatchNorm
from jbn.linen._replace import replace_batch_norm as replace_batch_norm

__all__ = ["BatchNorm", "replace_batch_norm"]
