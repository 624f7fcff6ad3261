"""Batch normalization for JAX that is right however the batch is cut.

The functional door: pure functions over parameters and running statistics. The Flax layers are in
`jbn.linen`, which this module does not import.
"""

from jbn._batch_norm import batch_norm as batch_norm
from jbn._init import init as init
from jbn._moments import Moments as Moments
from jbn._moments import merge as merge
from jbn._moments import moments as moments
from jbn._renorm import Renorm as Renorm
from jbn._running import update as update

__version__ = "0.1.0"
