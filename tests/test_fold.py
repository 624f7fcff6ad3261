"""Folding: the layer with the batch norm in it computes what both computed; in arrays and in whole models."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn.linen
import jbn.nnx
from jbn.tools._fold import fold, fold_variables
from tests.cases import assert_close, assert_trees_close, tolerance

pytestmark = pytest.mark.usefixtures("flax_promotion")

PARTS = {
    "scale and bias": (True, True),
    "scale": (True, False),
    "bias": (False, True),
    "neither": (False, False),
}
EPSILON = 1e-2  # not the default, and large enough to show in every value


def filled(tree, seed=0):
    """The tree of shapes with random values: variances are positive, scales of either sign."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        is_var = path[-1] == jax.tree_util.DictKey("var")
        values = rng.uniform(0.3, 3.0, leaf.shape) if is_var else rng.standard_normal(leaf.shape)
        if np.issubdtype(leaf.dtype, np.complexfloating):
            values = values + 1j * rng.standard_normal(leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


def variables_of(model, x, *args, seed=0):
    return filled(jax.eval_shape(lambda key: model.init(key, x, *args), jax.random.key(0)), seed)


def random(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def norm(parts=(True, True), **settings):
    return nn.BatchNorm(True, use_scale=parts[0], use_bias=parts[1], epsilon=EPSILON, **settings)


LAYERS = {  # the layer, its input, and the axes of the kernel with the output channels
    "Dense": (functools.partial(nn.Dense, 4), (5, 3), -1),
    "DenseGeneral": (functools.partial(nn.DenseGeneral, (2, 4), axis=(1, -1)), (5, 3, 2), (-2, -1)),
    "Conv 1D": (functools.partial(nn.Conv, 4, 3), (2, 5, 3), -1),
    "Conv 2D": (functools.partial(nn.Conv, 4, (2, 3)), (2, 5, 4, 3), -1),
    "Conv 3D": (functools.partial(nn.Conv, 4, (2, 1, 2)), (2, 3, 2, 4, 3), -1),
    "groups": (functools.partial(nn.Conv, 6, (3, 3), feature_group_count=2), (2, 4, 4, 4), -1),
    "depthwise": (functools.partial(nn.Conv, 4, (3, 3), feature_group_count=4), (2, 4, 4, 4), -1),
    "strides": (functools.partial(nn.Conv, 4, (3, 3), strides=2, padding="VALID"), (2, 5, 5, 3), -1),
    "dilation": (functools.partial(nn.Conv, 4, (2, 2), kernel_dilation=2), (2, 5, 5, 3), -1),
    "ConvTranspose": (functools.partial(nn.ConvTranspose, 4, (3, 2), strides=(2, 2)), (2, 3, 3, 3), -1),
    "ConvTranspose, kernel transposed": (
        functools.partial(nn.ConvTranspose, 3, (3, 2), strides=(2, 2), transpose_kernel=True),
        (2, 3, 3, 3),
        -2,
    ),
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("make", "shape", "axis"), LAYERS.values(), ids=LAYERS)
def test_the_folded_layer_computes_what_layer_and_batch_norm_compute(make, shape, axis, use_bias, parts):
    x, layer = random(*shape), make(use_bias=use_bias)
    variables = variables_of(layer, x)
    y = layer.apply(variables, x)
    bn = norm(parts, axis=(-2, -1) if isinstance(axis, tuple) else -1)
    bn_variables = variables_of(bn, y, seed=1)
    layer_params = variables["params"]
    kernel, bias = fold(
        layer_params["kernel"],
        layer_params.get("bias"),
        bn_variables.get("params"),
        bn_variables["batch_stats"],
        epsilon=EPSILON,
        axis=axis,
    )
    assert kernel.dtype == bias.dtype == np.float32
    folded = make(use_bias=True).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    assert_close(folded, bn.apply(bn_variables, y), tolerance(np.float32))


def arrays(dtype=np.float32, stats_dtype=np.float32):
    """kernel, bias, params and batch_stats of a Dense of 4 channels and its batch norm."""
    real = np.zeros(0, stats_dtype).real.dtype
    shapes = {"mean": (4, stats_dtype), "var": (4, real), "scale": (4, real), "bias": (4, real)}
    tree = {name: jax.ShapeDtypeStruct((size,), kind) for name, (size, kind) in shapes.items()}
    tree["kernel"] = jax.ShapeDtypeStruct((3, 4), dtype)
    tree["layer bias"] = jax.ShapeDtypeStruct((4,), dtype)
    tree = filled(tree)
    params, batch_stats = ({k: tree[k] for k in names} for names in (("scale", "bias"), ("mean", "var")))
    return tree["kernel"], tree["layer bias"], params, batch_stats


def test_the_value_worked_out_by_hand():
    ones = np.ones(1, np.float32)
    params, batch_stats = {"scale": ones / 2, "bias": -ones}, {"mean": 3 * ones, "var": 4 * ones}
    kernel, bias = fold(2 * ones[None], ones, params, batch_stats, epsilon=1e-3)
    assert abs(float(kernel[0, 0]) - 0.499938) < 5e-7
    assert abs(float(bias[0]) + 1.499938) < 5e-7


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_low_precision_is_rounded_once(dtype):
    kernel, bias, params, stats = arrays(dtype)
    exact = {name: np.asarray(value, np.float64) for name, value in (params | stats).items()}
    factor = exact["scale"] / np.sqrt(exact["var"] + 1e-5)
    expected = {
        "kernel": np.asarray(kernel, np.float64) * factor,
        "bias": (np.asarray(bias, np.float64) - exact["mean"]) * factor + exact["bias"],
        "no bias": -exact["mean"] * factor + exact["bias"],
    }
    folded = dict(zip(("kernel", "bias"), fold(kernel, bias, params, stats), strict=True))
    folded["no bias"] = fold(kernel, None, params, stats)[1]
    for name, value in folded.items():
        assert value.dtype == dtype
        off = np.abs(np.asarray(value, np.float64) - expected[name])
        assert (off <= 0.501 * float(jnp.finfo(dtype).eps) * np.abs(expected[name]) + 1e-6).all(), name


def test_bias_keeps_its_own_dtype():
    kernel, bias, params, stats = arrays(jnp.bfloat16)
    new_kernel, new_bias = fold(kernel, bias.astype(jnp.float32), params, stats)
    assert (new_kernel.dtype, new_bias.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(new_bias, fold(kernel.astype(jnp.float32), bias, params, stats)[1].astype(np.float32), 1e-2)


@pytest.mark.parametrize("dtype", [np.complex64, np.float32])
def test_complex_numbers(dtype):
    kernel, bias, params, stats = arrays(dtype, np.complex64)
    x = (random(5, 3) + 1j * random(5, 3)[::-1]).astype(np.complex64)
    y = x @ np.asarray(kernel) + np.asarray(bias)
    expected, _ = jbn.batch_norm(params, stats, y, use_running_average=True)
    kernel, bias = fold(kernel, bias, params, stats)
    assert kernel.dtype == dtype
    assert bias.dtype == np.complex64
    assert_close(x @ np.asarray(kernel) + np.asarray(bias), expected, 1e-6)


def test_a_constant_channel_without_epsilon_turns_into_bias():
    kernel, bias, params, stats = arrays()
    stats["var"] = stats["var"].at[1].set(0.0)
    kernel, bias = fold(kernel, bias, params, stats, epsilon=0.0)
    np.testing.assert_array_equal(kernel[:, 1], 0.0)
    assert bias[1] == params["bias"][1]
    assert np.isfinite(kernel).all()
    assert np.isfinite(bias).all()


def test_the_order_of_the_axes_does_not_matter():
    kernel, (_, stats) = random(3, 2, 4), jbn.init((2, 4))
    stats = filled(stats)
    for one, other in zip(
        fold(kernel, None, None, stats, axis=(-2, -1)),
        fold(kernel, None, {}, stats, axis=(2, 1)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_gradients_are_those_of_layer_and_batch_norm(x64):
    args = jax.tree.map(lambda value: np.asarray(value, np.float64), arrays())
    x, cotangent = random(5, 3).astype(np.float64), random(5, 4).astype(np.float64)

    def together(kernel, bias, params, stats):
        kernel, bias = fold(kernel, bias, params, stats, epsilon=EPSILON)
        return jnp.sum(cotangent * (x @ kernel + bias))

    def apart(kernel, bias, params, stats):
        y, _ = jbn.batch_norm(params, stats, x @ kernel + bias, use_running_average=True, epsilon=EPSILON)
        return jnp.sum(cotangent * y)

    everything = (0, 1, 2, 3)
    grads = jax.jit(jax.grad(together, everything))(*args)
    assert_trees_close(grads, jax.jit(jax.grad(apart, everything))(*args), 1e-12)


@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None)], ids=["over outputs", "over inputs"])
def test_a_sharded_kernel_stays_sharded(spec):
    """Also where the statistics are cut along the same mesh axis."""
    kernel, bias, params, stats = arrays()
    kernel = jnp.concatenate([kernel, kernel[:1]])
    expected = fold(kernel, bias, params, stats)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        cut = jax.device_put(kernel, NamedSharding(mesh, spec))
        rest = jax.device_put((bias, params, stats), NamedSharding(mesh, P("model")))
        new_kernel, new_bias = fold(cut, *rest)
        assert jax.typeof(new_kernel).sharding.spec == spec
        assert_close(new_kernel, expected[0], 1e-6)
        assert_close(new_bias, expected[1], 1e-6)


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
    model = nnx.eval_shape(lambda: NnxResNet(nnx.Rngs(0)))
    for kind, name in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
        state = nnx.state(model, kind)
        nnx.replace_by_pure_dict(state, resnet_variables()[name])
        nnx.update(model, state)
    return model


def collections(model):
    """The variables of an NNX module as those of the linen one."""
    states = {"params": nnx.state(model, nnx.Param), "batch_stats": nnx.state(model, nnx.BatchStat)}
    return {name: nnx.to_pure_dict(state) for name, state in states.items()}


def test_a_resnet(capsys):
    folded = fold_variables(resnet_variables(), call=resnet, x=IMAGES)
    lines = [f"{layer} -> {bn}" for layer, bn in PAIRS] + ["no layer found for: whiten"]
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(lines)
    assert_close(resnet(folded, IMAGES), resnet(resnet_variables(), IMAGES), 1e-5)
    for before, after in zip(jax.tree.leaves(resnet_variables()), jax.tree.leaves(folded), strict=True):
        assert (before.shape, before.dtype, before.weak_type) == (after.shape, after.dtype, after.weak_type)


def test_its_nnx_twin(capsys):
    model = nnx_resnet()
    before = collections(model)
    kept = jax.tree.map(np.array, before)
    folded = fold_variables(model, x=IMAGES)
    lines = [f"{layer} -> {bn}" for layer, bn in PAIRS] + ["no layer found for: whiten"]
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(lines)
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
    assert_trees_close(collections(twice) if isinstance(twice, nnx.Module) else twice, folded_resnet(), 1e-6)


def test_pairs_by_name_get_their_settings_from_the_model(capsys):
    folded = fold_variables(resnet_variables(), PAIRS, call=resnet, x=IMAGES, epsilon=0.5, axis=0)
    assert capsys.readouterr().out == ""
    assert_trees_close(folded, folded_resnet(), 0.0)


def test_folding_twice_is_folding_once():
    assert_trees_close(fold_variables(folded_resnet(), call=resnet, x=IMAGES), folded_resnet(), 1e-6)


def test_the_folded_model_is_exported():
    exported = export.export(jax.jit(resnet))(folded_resnet(), IMAGES)
    assert_close(exported.call(folded_resnet(), IMAGES), resnet(resnet_variables(), IMAGES), 1e-5)


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
    for kind in (nnx.Param, nnx.BatchStat):
        state = nnx.state(model, kind)
        nnx.replace_by_pure_dict(state, filled(nnx.to_pure_dict(state)))
        nnx.update(model, state)
    model.eval()
    return model, lambda model, x: model(x), x, ("layers/0", "layers/1")


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("make", "shape", "library"), MODEL_LAYERS.values(), ids=MODEL_LAYERS)
def test_a_model_of_each_layer(make, shape, library, use_bias, parts, capsys):
    model, call, x, names = model_of(make, shape, library, use_bias, parts)
    folded = fold_variables(model, call=call, x=x)
    assert capsys.readouterr().out == " -> ".join(names) + "\n"
    assert_close(call(folded, x), call(model, x), tolerance(np.float32))
    stats = collections(folded)["batch_stats"] if library is nnx else folded["batch_stats"]
    var = stats["layers"][1]["var"] if library is nnx else stats["layers_1"]["var"]
    np.testing.assert_array_equal(var, 1.0)


class OwnCall(nn.Dense):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Renamed(nn.Dense):
    pass


class Net(nn.Module):
    """A model of one function of x, in which modules are made."""

    run: callable

    @nn.compact
    def __call__(self, x):
        return self.run(x)


def shared(x):
    dense = nn.Dense(3)
    return norm()(dense(nn.relu(dense(x))))


def shared_norm(x):
    bn = norm()
    return bn(nn.Dense(3)(bn(x)))


def twice_normalized(x):
    y = nn.Dense(3)(x)
    return norm()(y) + norm(axis=-1)(y)


def taken_by_a_layer(x):
    y = nn.Dense(3)(x)
    return norm()(y) + nn.Dense(3)(y)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return norm()(nn.Dense(3)(x)), None


def stacked(kind):
    axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    if kind == "scan":
        return lambda x: nn.scan(Step, length=3, **axes)()(x, None)[0]
    return lambda x: nn.vmap(Step, in_axes=(0, None), **axes)()(x[None].repeat(3, 0), None)[0]


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
    model, x = Net(run), random(3, 3)
    variables = variables_of(model, x)
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
    model, x = Net(run), random(4, 3)
    variables = variables_of(model, x)
    result = fold_variables(variables, call=model.apply, x=x)
    out = capsys.readouterr().out
    assert out.count(" -> ") == out.count("\n") == 1
    assert jax.tree.structure(result) == jax.tree.structure(variables)
    assert_close(model.apply(result, x), model.apply(variables, x), tolerance(np.float32))


def dense_and_norm(run=lambda x: norm()(nn.Dense(3)(x)), x=None):
    model, x = Net(run), random(4, 3) if x is None else x
    return model, variables_of(model, x), x


def test_a_frozen_dict_stays_one():
    model, variables, x = dense_and_norm()
    result = fold_variables(freeze(variables), call=model.apply, x=x)
    assert isinstance(result, FrozenDict)
    assert_trees_close(result.unfreeze(), fold_variables(variables, call=model.apply, x=x), 0.0)


def test_a_call_that_was_compiled_before(capsys):
    model, variables, x = dense_and_norm()
    call = jax.jit(model.apply)
    call(variables, x)
    for _ in range(2):
        fold_variables(variables, call=call, x=x)
        assert capsys.readouterr().out == "Dense_0 -> BatchNorm_0\n"


def test_layers_that_run_as_ours(capsys):
    model, variables, x = dense_and_norm()
    with jbn.linen.replace_batch_norm():
        fold_variables(variables, call=model.apply, x=x)
    fold_variables(variables, call=jbn.linen.replace_batch_norm()(model.apply), x=x)
    assert capsys.readouterr().out == "Dense_0 -> BatchNorm_0\n" * 2


def test_inputs_that_are_no_floats_stay_as_they_are():
    def run(x):
        known = jnp.where(x["tokens"] > 90, x["weights"], np.nan)  # other tokens would be noticed
        return norm()(nn.Dense(3)(known))

    x = {"tokens": np.array([91, 99, 95])[:, None], "weights": random(3, 2)}
    model, variables, x = dense_and_norm(run, x)
    result = fold_variables(variables, call=model.apply, x=x)
    assert_close(model.apply(result, x), model.apply(variables, x), tolerance(np.float32))


def test_the_proof_is_at_full_precision():
    model, variables, x = dense_and_norm()
    seen = []

    def call(variables, x):
        seen.append(jax.config.jax_default_matmul_precision)
        return model.apply(variables, x)

    fold_variables(variables, call=call, x=x)
    assert seen == [None, "highest"]  # to find the pairs, and to compare


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


def test_a_shared_pair_is_folded_by_name():
    """Where a layer and its batch norm always run together, folding is right; only finding is careful."""

    def run(x):
        dense, bn = nn.Dense(3), norm()
        return bn(dense(nn.relu(bn(dense(x)))))

    model, variables, x = dense_and_norm(run)
    result = fold_variables(variables, [("Dense_0", "BatchNorm_0")], call=model.apply, x=x)
    assert_close(model.apply(result, x), model.apply(variables, x), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_models_of_low_precision(dtype):
    def run(x):
        return norm(param_dtype=dtype)(nn.Dense(3, param_dtype=dtype)(x))

    model, variables, x = dense_and_norm(run, random(4, 3).astype(dtype))
    result = fold_variables(variables, call=model.apply, x=x)
    assert model.apply(result, x).dtype == dtype
    assert result["params"]["Dense_0"]["kernel"].dtype == dtype
    pairs = [("Dense_0", "BatchNorm_0")]
    assert_trees_close(fold_variables(variables, pairs, epsilon=EPSILON), result, 0.0)


def test_layers_that_compute_in_low_precision():
    model, variables, x = dense_and_norm(lambda x: norm()(nn.Dense(3, dtype=jnp.bfloat16)(x)))
    result = fold_variables(variables, call=model.apply, x=x)
    assert result["params"]["Dense_0"]["kernel"].dtype == np.float32
    assert_close(model.apply(result, x), model.apply(variables, x), tolerance(jnp.bfloat16))


def test_a_scale_too_coarse_for_epsilon():
    """bfloat16 rounds sqrt(1 + 1e-3) to 1."""

    def run(x):
        return nn.BatchNorm(True, epsilon=1e-3, param_dtype=jnp.bfloat16, use_bias=False)(nn.Dense(3)(x))

    model, variables, x = dense_and_norm(run)
    result = fold_variables(variables, call=lambda v, x: model.apply(v, x).astype(np.float32), x=x)
    np.testing.assert_array_equal(result["params"]["BatchNorm_0"]["scale"].astype(np.float32), 1.0)
    assert_close(model.apply(result, x), model.apply(variables, x), tolerance(np.float32))


def used_elsewhere(x):
    y = nn.Dense(3)(x)
    good = norm(name="good_norm")(nn.Dense(3, name="good")(x))
    return norm()(y) + y + good


def test_only_the_pair_that_does_harm_is_blamed():
    model, variables, x = dense_and_norm(used_elsewhere)
    with pytest.raises(
        ValueError, match="pairs is a sequence with Dense_0 -> BatchNorm_0, which moves"
    ) as caught:
        fold_variables(variables, call=model.apply, x=x)
    assert "good" not in str(caught.value)
    result = fold_variables(variables, [("good", "good_norm")], call=model.apply, x=x)
    assert_close(model.apply(result, x), model.apply(variables, x), tolerance(np.float32))


HARMFUL = {
    "something between": (lambda x: norm()(nn.relu(nn.Dense(3)(x))), "Dense_0"),
    "the batch norm stands before": (lambda x: nn.Dense(3)(norm()(x)), "Dense_0"),
    "the batch norm of another layer": (
        lambda x: nn.Dense(3, name="other")(nn.relu(norm()(nn.Dense(3)(x)))),
        "other",
    ),
    "a layer that runs twice": (shared, "Dense_0"),
    "two batch norms behind one layer": (twice_normalized, "Dense_0"),
}


@pytest.mark.parametrize(("run", "layer"), HARMFUL.values(), ids=HARMFUL)
def test_folding_that_changes_the_outputs_is_refused(run, layer):
    model, variables, x = dense_and_norm(run)
    with pytest.raises(ValueError, match=f"{layer} -> BatchNorm_0, which moves outputs by"):
        fold_variables(variables, [(layer, "BatchNorm_0")], call=model.apply, x=x)


def test_pairs_that_do_harm_only_together_are_all_named():
    """Each of two layers is off by less than what is allowed, and both are not."""
    scale = np.float32(1 + 6e-6)
    one = {"kernel": np.ones((1, 1), np.float32)}
    stats = {"mean": np.zeros(1, np.float32), "var": np.ones(1, np.float32)}
    tree = dict.fromkeys(("a", "b"), one) | {name: {"scale": scale[None]} for name in ("c", "d")}
    variables = {"params": tree, "batch_stats": {"c": stats, "d": stats}}
    pairs = [("a", "c"), ("b", "d")]

    def call(variables, x):
        return x * variables["params"]["a"]["kernel"] * variables["params"]["b"]["kernel"]

    with pytest.raises(ValueError, match=r"a -> c, b -> d, which moves outputs by 1\.\de-05 of"):
        fold_variables(variables, pairs, call=call, x=random(4, 1), epsilon=0.0)


def test_nnx_folding_that_changes_the_outputs_is_refused():
    class Wrong(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.bn = nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
            self.bn.var.set_value(jnp.full(3, 2.0))

        def __call__(self, x):
            y = self.dense(x)
            return self.bn(y) * y

    with pytest.raises(ValueError, match="dense -> bn, which moves outputs by"):
        fold_variables(Wrong(nnx.Rngs(0)), x=random(4, 3))


ONE = {"kernel": np.ones((1, 1), np.float32)}
ONE_NORM = {"scale": np.full(1, 2, np.float32)}
ONE_STATS = {"mean": np.zeros(1, np.float32), "var": np.ones(1, np.float32)}
ONE_MODEL = {"params": {"a": ONE, "b": ONE_NORM}, "batch_stats": {"b": ONE_STATS}}
KERNEL, BIAS, PARAMS, STATS = arrays()
MODEL_FIX = (
    "Pass call=lambda variables, x: model.apply(variables, x, train=False) and an example x, or "
    "pairs=[('Conv_0', 'BatchNorm_0')]."
)
SIZE_FIX = "Set axis to where the kernel has its output channels; fold stacked layers one by one."
AXIS_FIX = "Name those with the output channels: -1, or -2 for transpose_kernel=True."
MOVED_FIX = (
    "Leave the pair out: something else uses the layer's output too, or stands between it and the batch "
    "norm, or its epsilon is another, or the new values do not fit their dtype."
)


def stacked_model():
    model, x = Net(stacked("scan")), random(3, 3)
    variables = variables_of(model, x)
    return fold_variables(variables, [("ScanStep_0/Dense_0", "ScanStep_0/BatchNorm_0")])


def out_of_range_of_float16(var):
    layer = {"kernel": np.ones((3, 1), np.float16)}
    stats = ONE_STATS | {"var": np.full(1, var, np.float32)}
    variables = {"params": {"a": layer}, "batch_stats": {"b": stats}}
    return fold_variables(variables, [("a", "b")], epsilon=0.0)


TEXTS = {
    "a quantized kernel": (
        lambda: fold(np.ones((3, 4), np.int8), None, PARAMS, STATS),
        "jbn.tools.fold: kernel is int8[3,4]. Expected a floating or complex array. Fold first, and quantize "
        "then.",
    ),
    "no kernel": (
        lambda: fold(None, BIAS, PARAMS, STATS),
        "jbn.tools.fold: kernel is None. Expected a floating or complex array. Fold first, and quantize "
        "then.",
    ),
    "a bias of text": (
        lambda: fold(KERNEL, "bias", PARAMS, STATS),
        "jbn.tools.fold: bias is 'bias'. Expected a floating or complex array. Fold first, and quantize "
        "then.",
    ),
    "axis out of range": (
        lambda: fold(KERNEL, BIAS, PARAMS, STATS, axis=2),
        "jbn.tools.fold: axis is 2. Expected one or several different axes of kernel = float32[3,4]. "
        + AXIS_FIX,
    ),
    "axis twice": (
        lambda: fold(KERNEL, BIAS, PARAMS, STATS, axis=(1, -1)),
        "jbn.tools.fold: axis is (1, -1). Expected one or several different axes of kernel = float32[3,4]. "
        + AXIS_FIX,
    ),
    "no axis": (
        lambda: fold(KERNEL, BIAS, PARAMS, STATS, axis=()),
        "jbn.tools.fold: axis is (). Expected one or several different axes of kernel = float32[3,4]. "
        + AXIS_FIX,
    ),
    "axis of text": (
        lambda: fold(KERNEL, BIAS, PARAMS, STATS, axis="C"),
        "jbn.tools.fold: axis is 'C'. Expected one or several different axes of kernel = float32[3,4]. "
        + AXIS_FIX,
    ),
    "negative epsilon": (
        lambda: fold(KERNEL, BIAS, PARAMS, STATS, epsilon=-1.0),
        "jbn.tools.fold: epsilon is -1.0. Expected a static number from 0 up. The usual one is 1e-5.",
    ),
    "params of a model": (
        lambda: fold(KERNEL, BIAS, {"BatchNorm_0": PARAMS}, STATS),
        "jbn.tools.fold: params is a mapping with BatchNorm_0. Expected no entry but scale, bias. Pass the "
        "collection of one layer, for example variables['params']['BatchNorm_0'].",
    ),
    "no variance": (
        lambda: fold(KERNEL, BIAS, PARAMS, {"mean": STATS["mean"]}),
        "jbn.tools.fold: batch_stats['var'] is None. Expected shape (4,), that of axis -1 of kernel = "
        "float32[3,4]. " + SIZE_FIX,
    ),
    "the wrong axis": (
        lambda: fold(KERNEL, BIAS, PARAMS, STATS, axis=-2),
        "jbn.tools.fold: params['scale'] is float32[4]. Expected shape (3,), that of axis -2 of kernel = "
        "float32[3,4]. " + SIZE_FIX,
    ),
    "a bias of another size": (
        lambda: fold(KERNEL, BIAS[:3], PARAMS, STATS),
        "jbn.tools.fold: bias is float32[3]. Expected shape (4,), that of axis -1 of kernel = float32[3,4]. "
        + SIZE_FIX,
    ),
    "no pairs and no call": (
        lambda: fold_variables(ONE_MODEL, x=np.ones((1, 1), np.float32)),
        "jbn.tools.fold_variables: pairs is None, and no batch norm was seen to run. Expected pairs, or the "
        "call of a model and its x. " + MODEL_FIX,
    ),
    "a call of no batch norm": (
        lambda: fold_variables(ONE_MODEL, call=lambda variables, x: x, x=np.ones((1, 1), np.float32)),
        "jbn.tools.fold_variables: pairs is None, and no batch norm was seen to run. Expected pairs, or the "
        "call of a model and its x. " + MODEL_FIX,
    ),
    "a call without x": (
        lambda: fold_variables(ONE_MODEL, call=lambda variables, x: x),
        "jbn.tools.fold_variables: x is None. Expected an example input of call. One example with its batch "
        "axis will do.",
    ),
    "a pair alone": (
        lambda: fold_variables(ONE_MODEL, ("a", "b")),
        "jbn.tools.fold_variables: pairs is a sequence with 'a'. Expected pairs of a layer and a batch norm. "
        "For example [('block/Conv_0', 'block/BatchNorm_0')].",
    ),
    "a layer that is none": (
        lambda: fold_variables(ONE_MODEL, [("b", "b")]),
        "jbn.tools.fold_variables: pairs is a sequence with the layer 'b'. Expected a layer of the model: a. "
        "Paths are those of the variables; a shared NNX module has the first of its paths.",
    ),
    "a batch norm that is none": (
        lambda: fold_variables(ONE_MODEL, [("a", ("block", "b"))]),
        "jbn.tools.fold_variables: pairs is a sequence with the batch norm 'block/b'. Expected a batch norm "
        "of the model: b. Paths are those of the variables; a shared NNX module has the first of its paths.",
    ),
    "a model without layers": (
        lambda: fold_variables({"batch_stats": {"b": ONE_STATS}}, [("a", "b")]),
        "jbn.tools.fold_variables: pairs is a sequence with the layer 'a'. Expected a layer of the model: it "
        "has none. Paths are those of the variables; a shared NNX module has the first of its paths.",
    ),
    "a pair twice": (
        lambda: fold_variables(ONE_MODEL, [("a", "b"), ("a", "b")]),
        "jbn.tools.fold_variables: pairs is a sequence with a, b in several pairs. Expected each layer and "
        "each batch norm once. A layer takes one batch norm.",
    ),
    "stacked layers": (
        stacked_model,
        "jbn.tools.fold_variables 'ScanStep_0/Dense_0 -> ScanStep_0/BatchNorm_0': params['bias'] is "
        "float32[3,3]. Expected shape (3,), that of axis -1 of kernel = float32[3,3,3]. " + SIZE_FIX,
    ),
    "outputs that move": (
        lambda: fold_variables(
            ONE_MODEL,
            [("a", "b")],
            call=lambda variables, x: x * variables["params"]["a"]["kernel"],
            x=np.ones((1, 1), np.float32),
            epsilon=0.0,
        ),
        "jbn.tools.fold_variables: pairs is a sequence with a -> b, which moves outputs by 1.0e+00 of the "
        "largest. Expected at most 1.0e-05. " + MOVED_FIX,
    ),
    "values too large for their dtype": (
        lambda: out_of_range_of_float16(1e-12),
        "jbn.tools.fold_variables: pairs is a sequence with a -> b, which moves outputs by nan of the "
        "largest. Expected at most 3.9e-03. " + MOVED_FIX,
    ),
    "values too small for their dtype": (
        lambda: out_of_range_of_float16(1e18),
        "jbn.tools.fold_variables: pairs is a sequence with a -> b, which moves outputs by 1.0e+00 of the "
        "largest. Expected at most 3.9e-03. " + MOVED_FIX,
    ),
}
