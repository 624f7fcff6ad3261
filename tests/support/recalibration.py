"""A model of two batch norms, in linen and in NNX, and batches: shared by the tests of recalibration."""

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

import jbn.linen
import jbn.nnx
from tests.support.cases import tolerance

TOLERANCE = tolerance(np.float32)
X = (np.random.default_rng(0).standard_normal((50, 3)) * 2 + 5).astype(np.float32)
PARTS = [X[:8], X[8:30], X[30:]]


class Net(nn.Module):
    """The first batch norm sees x, the second one what the first gives in training."""

    kind: type = jbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train, mask=None, **options):
        x = self.kind(use_running_average=not train, name="first")(x, mask=mask, **options)
        x = nn.relu(nn.Dense(4, name="dense")(x))
        return self.kind(use_running_average=not train, name="second")(x, mask=mask, **options)


def linen(kind=jbn.linen.BatchNorm):
    net = Net(kind)
    return net.init(jax.random.key(0), X, False), lambda v, x, **options: net.apply(v, x, True, **options)


class NnxNet(nnx.Module):
    def __init__(self, kind=jbn.nnx.BatchNorm):
        self.first = kind(3, rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(3, 4, rngs=nnx.Rngs(1))
        self.second = kind(4, rngs=nnx.Rngs(2))

    def __call__(self, x, **options):
        return self.second(nnx.relu(self.dense(self.first(x, **options))), **options)
