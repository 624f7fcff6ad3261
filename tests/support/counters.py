"""Models whose batch norms count their updates, in linen and in NNX: shared by the tests of the counters."""

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

import jbn.linen
import jbn.nnx
from tests.support.cases import tolerance

TOLERANCE = tolerance(np.float32)
X = (np.random.default_rng(0).standard_normal((20, 3)) * 2 + 5).astype(np.float32)
SETTINGS = {"momentum": 0.75, "debias": True}


class Net(nn.Module):
    settings: dict
    affine: bool = True

    @nn.compact
    def __call__(self, x, train=False, **options):
        x = nn.Dense(4, name="dense", use_bias=self.affine)(x)
        norm = jbn.linen.BatchNorm(use_scale=self.affine, use_bias=self.affine, name="norm", **self.settings)
        return norm(x, use_running_average=not train, **options)


class NnxNet(nnx.Module):
    def __init__(self, settings, affine=True):
        self.dense = nnx.Linear(3, 4, use_bias=affine, rngs=nnx.Rngs(0))
        options = {"use_scale": affine, "use_bias": affine, "rngs": nnx.Rngs(1)}
        self.norm = jbn.nnx.BatchNorm(4, **settings, **options)

    def __call__(self, x, **options):
        return self.norm(self.dense(x), **options)


def linen(settings=SETTINGS, affine=True, updates=1):
    """A net and its variables after some updates."""
    net = Net(settings, affine)
    variables = net.init(jax.random.key(0), X)
    for _ in range(updates):
        _, new = net.apply(variables, X, train=True, mutable=["batch_stats"])
        variables = variables | new
    return net, variables


def of_nnx(settings=SETTINGS, affine=True, updates=1):
    model = NnxNet(settings, affine)
    for _ in range(updates):
        model(X)
    model.eval()
    return model
