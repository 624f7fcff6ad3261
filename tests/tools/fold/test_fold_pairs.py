"""Finding the layer before each batch norm: every kind of layer, and nothing where folding would be wrong."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn.linen
from jbn.tools import fold_variables
from tests.support.cases import assert_close, assert_trees_close
from tests.support.fold_models import (
    EPSILON,
    LAYERS,
    PARTS,
    TOLERANCE,
    Step,
    assert_folds,
    collections,
    fill_nnx,
    filled,
    net,
    norm,
    random,
    shared,
    stacked,
    twice_normalized,
    variables_of,
)

pytestmark = pytest.mark.usefixtures("flax_promotion")

MODEL_LAYERS = {
    **{name: (*LAYERS[name][:2], nn) for name in ("Dense", "DenseGeneral", "groups")},
    "ConvTranspose": (*LAYERS["ConvTranspose, kernel transposed"][:2], nn),
    "Linear": (functools.partial(nnx.Linear, 3, 4), (5, 3), nnx),
    "LinearGeneral": (functools.partial(nnx.LinearGeneral, (3, 2), (2, 4), axis=(1, -1)), (5, 3, 2), nnx),
    "nnx Conv": (functools.partial(nnx.Conv, 4, 6, (3, 3), feature_group_count=2), (2, 4, 4, 4), nnx),
    "nnx ConvTranspose": (functools.partial(nnx.ConvTranspose, 3, 4, (3, 2), strides=2), (2, 3, 3, 3), nnx),
    "nnx ConvTranspose, kernel transposed": (
        functools.partial(nnx.ConvTranspose, 3, 4, (3, 2), strides=2, transpose_kernel=True),
        (2, 3, 3, 3),
        nnx,
    ),
}


def model_of(make, shape, library, use_bias, parts):
    """A layer and a batch norm: variables or module, how it is called, and the paths of both."""
    x = random(*shape)
    general = getattr(make, "func") in (nn.DenseGeneral, nnx.LinearGeneral)  # noqa: B009
    axis = (-2, -1) if general else -1
    if library is nn:
        model = nn.Sequential([make(use_bias=use_bias), norm(parts, axis=axis)])
        return variables_of(model, x), model.apply, x, ("layers_0", "layers_1")
    layer = make(use_bias=use_bias, rngs=nnx.Rngs(0))
    settings = {"use_scale": parts[0], "use_bias": parts[1], "epsilon": EPSILON, "axis": axis}
    features = layer.out_features
    bn = nnx.BatchNorm(1 if general else features, rngs=nnx.Rngs(0), **settings)
    if general:  # Flax's takes one axis in the constructor, and several in the call
        for name in ("mean", "var", "scale", "bias"):
            if getattr(bn, name) is not None:
                getattr(bn, name).set_value(jnp.ones(features))
    model = nnx.Sequential(layer, bn)
    fill_nnx(model, filled(collections(model)))
    model.eval()
    return model, lambda model, x: model(x), x, ("layers/0", "layers/1")


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("make", "shape", "library"), MODEL_LAYERS.values(), ids=MODEL_LAYERS)
def test_a_model_of_each_layer(make, shape, library, use_bias, parts, capsys):
    model, call, x, names = model_of(make, shape, library, use_bias, parts)
    folded = fold_variables(model, call=call, x=x)
    assert capsys.readouterr().out == " -> ".join(names) + "\n"
    assert_close(call(folded, x), call(model, x), TOLERANCE)
    stats = collections(folded)["batch_stats"]
    var = stats["layers"][1]["var"] if library is nnx else stats["layers_1"]["var"]
    np.testing.assert_array_equal(var, 1.0)


class OwnCall(nn.Dense):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Renamed(nn.Dense):
    pass


def shared_norm(x):
    bn = norm()
    return bn(nn.Dense(3)(bn(x)))


def taken_by_a_layer(x):
    y = nn.Dense(3)(x)
    return norm()(y) + nn.Dense(3)(y)


NOT_FOUND = {
    "something between": lambda x: norm()(nn.relu(nn.Dense(3)(x))),
    "a layer that runs twice": shared,
    "a batch norm that runs twice": shared_norm,
    "two batch norms behind one layer": twice_normalized,
    "a layer that takes it too": taken_by_a_layer,
    "over another axis": lambda x: norm(axis=0)(nn.Dense(3)(x)),
    "over one of two output axes": lambda x: norm()(nn.DenseGeneral((2, 3))(x)),
    "over one more axis": lambda x: norm(axis=(0, 1))(nn.Dense(3)(x)),
    "a bias per example": lambda x: norm()(nn.DenseGeneral(3, batch_dims=(0,))(x)),
    "a layer that does more": lambda x: norm()(OwnCall(3)(x)),
    "a normalization that is none": lambda x: norm()(nn.LayerNorm()(x)),
    "stacked by scan": stacked("scan"),
    "stacked by vmap": stacked("vmap"),
    "jit between": lambda x: norm()(nn.jit(nn.Dense)(3)(x)),
}


@pytest.mark.parametrize("run", NOT_FOUND.values(), ids=NOT_FOUND)
def test_what_is_not_found_is_named_and_left_as_it_is(run, capsys):
    model, variables, x = net(run, random(3, 3))
    result = fold_variables(variables, call=model.apply, x=x)
    out = capsys.readouterr().out
    assert out.startswith("no layer found for: ")
    assert out.count("\n") == 1
    assert "->" not in out
    assert_trees_close(result, variables, 0.0)


FOUND = {
    "a subclass with nothing of its own": lambda x: norm()(Renamed(3)(x)),
    "by keyword": lambda x: norm()(x=nn.Dense(3)(x)),
    "behind what does nothing": lambda x: norm()(nn.Dropout(0.5, deterministic=True)(nn.Dense(3)(x))),
    "inside of jit": lambda x: nn.jit(Step)()(x, None)[0],
    "inside of remat": lambda x: nn.remat(Step)()(x, None)[0],
    "boxed": lambda x: norm()(
        nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model")))(x)
    ),
    "ours": lambda x: jbn.linen.BatchNorm(True, epsilon=EPSILON)(nn.Dense(3)(x)),
}


@pytest.mark.parametrize("run", FOUND.values(), ids=FOUND)
def test_what_is_found(run, capsys):
    assert_folds(run)
    out = capsys.readouterr().out
    assert out.count(" -> ") == out.count("\n") == 1


def test_what_is_printed_is_plain_text_in_one_line(capsys, monkeypatch):
    """Also on a narrow terminal with colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    model, variables, x = net(lambda x: norm(name="None")(nn.Dense(3, name="the [red] layer")(x)))
    fold_variables(variables, call=model.apply, x=x)
    assert capsys.readouterr().out == "the [red] layer -> None\n"


def test_a_call_that_was_compiled_before(capsys):
    model, variables, x = net()
    call = jax.jit(model.apply)
    call(variables, x)
    for _ in range(2):
        fold_variables(variables, call=call, x=x)
        assert capsys.readouterr().out == "Dense_0 -> BatchNorm_0\n"


def test_layers_that_run_as_ours(capsys):
    model, variables, x = net()
    with jbn.linen.replace_batch_norm():
        fold_variables(variables, call=model.apply, x=x)
    fold_variables(variables, call=jbn.linen.replace_batch_norm()(model.apply), x=x)
    assert capsys.readouterr().out == "Dense_0 -> BatchNorm_0\n" * 2


class NnxShared(nnx.Module):
    """Two layers share a module, two a kernel, and two batch norms a mean; one pair is as it should be."""

    def __init__(self, rngs):
        layer, bn = functools.partial(nnx.Linear, 3, 3, rngs=rngs), lambda: nnx.BatchNorm(3, rngs=rngs)
        self.a, self.tied, self.other, self.last = layer(), layer(), layer(), layer()
        self.b, self.other.kernel = self.a, self.tied.kernel
        self.norms = nnx.List([bn(), bn(), bn(), bn()])
        self.norms[3].mean = self.norms[1].mean
        self.good = nnx.Sequential(layer(), bn())

    def __call__(self, x):
        x = self.norms[0](self.b(nnx.relu(self.a(x))))
        x = self.norms[1](self.tied(x)) + self.norms[2](self.other(x))
        return self.good(self.norms[3](self.last(x)))


def test_shared_nnx_layers_and_weights_are_not_found(capsys):
    fold_variables(NnxShared(nnx.Rngs(0)), x=random(4, 3))
    assert capsys.readouterr().out == (
        "good/layers/0 -> good/layers/1\nno layer found for: norms/0, norms/1, norms/2\n"
    )
