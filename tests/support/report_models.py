"""Models with given statistics, and moments of batches: what the tests of the report share."""

import numpy as np
from flax import nnx

import jbn
import jbn.nnx


def array(*values, dtype=np.float32):
    return np.array(values, dtype)


def variables_of(**layers):
    """Linen variables of these layers, each given as its mean, var and perhaps scale."""
    stats = {name: {"mean": mean, "var": var} for name, (mean, var, *_) in layers.items()}
    params = {name: {"scale": scale[0]} for name, (_, _, *scale) in layers.items() if scale}
    return {"params": params, "batch_stats": stats}


def moments_of(mean, var, count=None):
    return jbn.Moments(np.full_like(var, 8) if count is None else count, mean, var)


HEALTHY = (array(0.5, -2.0), array(2.0, 0.5), array(1.0, 0.5))
BATCH = moments_of(*HEALTHY[:2])
VARIABLES = variables_of(bn=HEALTHY)


def only(found):
    (row,) = found.rows
    return row


class NNXNet(nnx.Module):
    def __init__(self):
        self.first, self.last = (jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(2))

    def __call__(self, x):
        return self.last(self.first(x) * x)
