"""Folding a residual network, in linen and in NNX with the same weights: all is found, nothing is written."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from jax import export

import jbn.linen
import jbn.nnx
from jbn.tools import fold_variables
from tests.support.cases import assert_close, assert_trees_close
from tests.support.fold_models import collections, fill_nnx, random, variables_of

pytestmark = pytest.mark.usefixtures("flax_promotion")


class Block(nn.Module):
    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        bn = functools.partial(nn.BatchNorm, not train, epsilon=1e-3)
        y = nn.relu(bn(name="bn1")(conv((3, 3), self.strides, name="conv1")(x)))
        y = bn(name="bn2", use_bias=False)(conv((3, 3), name="conv2")(y))
        if x.shape != y.shape:
            project = nn.Conv(self.features, (1, 1), self.strides, name="conv3")
            x = jbn.linen.BatchNorm(not train, use_scale=False, name="bn3")(project(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train, name="whiten")(x)
        x = nn.Conv(4, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(not train, use_bias=False, use_scale=False, name="bn")(x))
        x = Block(6, 2, name="block2")(
            nn.remat(Block, static_argnums=(2,))(4, name="block1")(x, train), train
        )
        x = nn.Dense(4, name="hidden")(x.mean((1, 2)))
        return nn.Dense(2, name="head")(nn.BatchNorm(not train, name="norm")(x))


IMAGES = random(2, 6, 6, 3)
PAIRS = [
    ("stem", "bn"),
    ("block1/conv1", "block1/bn1"),
    ("block1/conv2", "block1/bn2"),
    ("block2/conv1", "block2/bn1"),
    ("block2/conv2", "block2/bn2"),
    ("block2/conv3", "block2/bn3"),
    ("hidden", "norm"),
]


def resnet(variables, x):
    return ResNet().apply(variables, x, False)


@functools.cache
def resnet_variables():
    return variables_of(ResNet(), IMAGES, False)


@functools.cache
def folded_resnet():
    return fold_variables(resnet_variables(), call=resnet, x=IMAGES)


class NnxBlock(nnx.Module):
    def __init__(self, inputs, features, strides, rngs):
        conv, bn = functools.partial(nnx.Conv, rngs=rngs), functools.partial(nnx.BatchNorm, rngs=rngs)
        self.conv1 = conv(inputs, features, (3, 3), strides, use_bias=False)
        self.bn1 = bn(features, epsilon=1e-3)
        self.conv2 = conv(features, features, (3, 3), use_bias=False)
        self.bn2 = bn(features, epsilon=1e-3, use_bias=False)
        self.project = strides > 1
        if self.project:
            self.conv3 = conv(inputs, features, (1, 1), strides)
            self.bn3 = jbn.nnx.BatchNorm(features, use_scale=False, rngs=rngs)

    def __call__(self, x):
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        return nnx.relu((self.bn3(self.conv3(x)) if self.project else x) + y)


class NnxResNet(nnx.Module):
    def __init__(self, rngs):
        self.whiten = nnx.BatchNorm(3, rngs=rngs)
        self.stem = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_bias=False, use_scale=False, rngs=rngs)
        self.block1, self.block2 = NnxBlock(4, 4, 1, rngs), NnxBlock(4, 6, 2, rngs)
        self.hidden, self.norm = nnx.Linear(6, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.stem(self.whiten(x))))
        return self.head(self.norm(self.hidden(self.block2(self.block1(x)).mean((1, 2)))))


def nnx_resnet():
    """The model with the weights of the other."""
    return fill_nnx(nnx.eval_shape(lambda: NnxResNet(nnx.Rngs(0))), resnet_variables())


def assert_prints_all_pairs(capsys):
    lines = [f"{layer} -> {bn}" for layer, bn in PAIRS] + ["no layer found for: whiten"]
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(lines)


def test_a_resnet(capsys):
    folded = fold_variables(resnet_variables(), call=resnet, x=IMAGES)
    assert_prints_all_pairs(capsys)
    assert_close(resnet(folded, IMAGES), resnet(resnet_variables(), IMAGES), 1e-5)
    for before, after in zip(jax.tree.leaves(resnet_variables()), jax.tree.leaves(folded), strict=True):
        assert (before.shape, before.dtype, before.weak_type) == (after.shape, after.dtype, after.weak_type)


def test_its_nnx_twin(capsys):
    model = nnx_resnet()
    before = collections(model)
    kept = jax.tree.map(np.array, before)
    folded = fold_variables(model, x=IMAGES)
    assert_prints_all_pairs(capsys)
    assert_trees_close(collections(folded), folded_resnet(), 1e-6)
    assert folded is not model
    assert type(folded) is NnxResNet
    assert type(folded.stem) is nnx.Conv
    assert folded.bn.use_running_average is model.bn.use_running_average is False
    assert all(
        a is b for a, b in zip(jax.tree.leaves(collections(model)), jax.tree.leaves(before), strict=True)
    )
    assert_trees_close(before, kept, 0.0)
    folded.eval()
    assert_close(folded(IMAGES), resnet(resnet_variables(), IMAGES), 1e-5)


def test_each_batch_norm_is_the_identity():
    """As far as its layer has a bias; else its bias, or without one its mean, keeps the offset."""
    keeps = {"bn": "mean", "bn1": "bias", "bn2": "mean", "bn3": None, "norm": None}
    for _, path in PAIRS:
        *blocks, name = path.split("/")
        params, stats = (folded_resnet()[kind] for kind in ("params", "batch_stats"))
        for key in blocks:
            params, stats = params[key], stats[key]
        params, stats = params.get(name, {}), stats[name]
        values = {**stats, **params}
        np.testing.assert_array_equal(values["var"], 1.0)
        if "scale" in values:
            epsilon = 1e-3 if blocks else 1e-5
            np.testing.assert_array_equal(values["scale"], np.float32(np.sqrt(1 + epsilon)))
        for entry in {"mean", "bias"} & set(values):
            assert np.all(np.asarray(values[entry]) == 0.0) == (entry != keeps[name]), (path, entry)


def test_the_arguments_are_not_written():
    variables = resnet_variables()
    leaves, values = jax.tree.leaves(variables), jax.tree.map(np.array, jax.tree.leaves(variables))
    fold_variables(variables, call=resnet, x=IMAGES)
    assert all(a is b for a, b in zip(jax.tree.leaves(variables), leaves, strict=True))
    assert_trees_close(leaves, values, 0.0)


@pytest.mark.parametrize("model", [resnet_variables, nnx_resnet])
def test_pairs_by_name_are_those_found(model):
    some = [(tuple(layer.split("/")), bn) for layer, bn in PAIRS if "block" in layer and "3" not in layer]
    once = fold_variables(model(), some, epsilon=1e-3)
    twice = fold_variables(once, [pair for pair in PAIRS if "block" not in pair[0] or "3" in pair[0]])
    assert_trees_close(collections(twice), folded_resnet(), 1e-6)


def test_pairs_by_name_get_their_settings_from_the_model(capsys):
    folded = fold_variables(resnet_variables(), PAIRS, call=resnet, x=IMAGES, epsilon=0.5, axis=0)
    assert capsys.readouterr().out == ""
    assert_trees_close(folded, folded_resnet(), 0.0)


def test_folding_twice_is_folding_once():
    assert_trees_close(fold_variables(folded_resnet(), call=resnet, x=IMAGES), folded_resnet(), 1e-6)


def test_the_folded_model_is_exported():
    exported = export.export(jax.jit(resnet))(folded_resnet(), IMAGES)
    assert_close(exported.call(folded_resnet(), IMAGES), resnet(resnet_variables(), IMAGES), 1e-5)
