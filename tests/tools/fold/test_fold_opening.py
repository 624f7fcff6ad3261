"""Folding opens a model once, and gives back one that shares no variable with it."""

import functools
from collections import Counter

import flax.linen as nn
import pytest
from flax import nnx

from jbn.tools import _models, fold_variables
from tests.support.fold_models import EPSILON, net, norm, random

pytestmark = pytest.mark.usefixtures("flax_promotion")

X = random(4, 3)


def linen_chain(pairs, end=lambda y: y):
    """So many pairs, and what is done with the output of the last layer beside its batch norm."""

    def run(x):
        for i in range(pairs):
            y = nn.Dense(3, name=f"dense{i}")(x)
            x = norm(name=f"norm{i}")(y)
        return end(x, y)

    model, variables, _ = net(run, X)
    return model, variables, [(f"dense{i}", f"norm{i}") for i in range(pairs)]


class Chain(nnx.Module):
    def __init__(self, pairs):
        rngs = nnx.Rngs(0)
        self.dense = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(pairs)])
        self.norm = nnx.List([nnx.BatchNorm(3, epsilon=EPSILON, rngs=rngs) for _ in range(pairs)])

    def __call__(self, x):
        for dense, bn in zip(self.dense, self.norm, strict=True):
            x = bn(dense(x))
        return x


def linen_by_call(pairs):
    model, variables, _ = linen_chain(pairs, lambda x, y: x)
    return functools.partial(fold_variables, variables, call=model.apply, x=X)


def linen_with_one_left_out(pairs):
    model, variables, _ = linen_chain(pairs, lambda x, y: x + y)
    return functools.partial(fold_variables, variables, call=model.apply, x=X)


def linen_by_pairs(pairs):
    _, variables, named = linen_chain(pairs, lambda x, y: x)
    return functools.partial(fold_variables, variables, named, epsilon=EPSILON)


def nnx_by_call(pairs):
    return functools.partial(fold_variables, Chain(pairs), x=X)


def nnx_by_pairs(pairs):
    named = [(f"dense/{i}", f"norm/{i}") for i in range(pairs)]
    return functools.partial(fold_variables, Chain(pairs), named, epsilon=EPSILON)


READS = [
    (_models, "flatten_dict"),
    (_models, "unfreeze"),
    (_models, "FlatCollection"),
    *((nnx, name) for name in ("split", "state", "clone", "to_pure_dict")),
]


def reads(call, monkeypatch):
    """How often what goes through a whole model is called."""
    count = Counter()

    def counted(read, name):
        def counting(*args, **kwargs):
            count[name] += 1
            return read(*args, **kwargs)

        return counting

    with monkeypatch.context() as patch:
        for module, name in READS:
            patch.setattr(module, name, counted(getattr(module, name), name))
        call()
    return count


@pytest.mark.parametrize(
    "folding", [linen_by_call, linen_with_one_left_out, linen_by_pairs, nnx_by_call, nnx_by_pairs]
)
def test_a_model_is_read_no_more_often_for_more_pairs(folding, monkeypatch):
    few, many = (reads(folding(pairs), monkeypatch) for pairs in (2, 4))
    assert few["flatten_dict"] == 2  # params and batch_stats
    assert many == few


@pytest.mark.parametrize("pairs", [[], [("dense/0", "norm/0")]], ids=["no pair", "one of two"])
def test_a_folded_module_shares_no_variable_with_the_one_given(pairs):
    model = Chain(2)
    folded = fold_variables(model, pairs, epsilon=EPSILON)
    for (path, mine), (other, theirs) in zip(variables_of(model), variables_of(folded), strict=True):
        assert path == other
        assert mine is not theirs


def variables_of(module):
    return [(path, node) for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Variable)]
