"""A torchvision-shaped ResNet block into Flax and back: bit-equal arrays, the same outputs in evaluation."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

import jbn.linen
import jbn.nnx
import jbn.tools
from tests.project.test_documentation import ROOT, blocks
from tests.support.cases import assert_close, loosely
from tests.support.fold_models import variables_of
from tests.support.foreign import assert_same

X = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
VECTOR = X[0, 0, 0]
MAPPING = {
    "conv1": "Conv_0",
    "bn1": "BatchNorm_0",
    "conv2": "Conv_1",
    "bn2": "BatchNorm_1",
    "downsample.0": "Conv_2",
    "downsample.1": "BatchNorm_2",
}
WIDTH = 2


class BasicBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        conv = lambda size, strides, pad: nn.Conv(6, (size, size), strides, pad, use_bias=False)  # noqa: E731
        norm = lambda: jbn.linen.BatchNorm(use_running_average=True)  # noqa: E731
        y = nn.relu(norm()(conv(3, 2, 1)(x)))
        y = norm()(conv(3, 1, 1)(y))
        return nn.relu(y + norm()(conv(1, 2, 0)(x)))


def torch_block(torch):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(4, 6, 3, 2, 1, bias=False)
            self.bn1 = torch.nn.BatchNorm2d(6)
            self.conv2 = torch.nn.Conv2d(6, 6, 3, 1, 1, bias=False)
            self.bn2 = torch.nn.BatchNorm2d(6)
            shortcut = torch.nn.Conv2d(4, 6, 1, 2, bias=False)
            self.downsample = torch.nn.Sequential(shortcut, torch.nn.BatchNorm2d(6))

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))

    torch.manual_seed(0)
    block = Block()
    for step in range(3):  # statistics that are not those of a new layer
        block(torch.from_numpy(np.random.default_rng(step).standard_normal((8, 4, 8, 8)).astype(np.float32)))
    return block.eval()


def test_a_torch_block_into_flax_and_back():
    torch = pytest.importorskip("torch")
    block = torch_block(torch)
    variables = jbn.tools.from_torch_state_dict(block.state_dict(), MAPPING)
    with torch.no_grad():
        expected = block(torch.from_numpy(np.ascontiguousarray(X.transpose(0, 3, 1, 2)))).numpy()
    with loosely():
        y = BasicBlock().apply(variables, X)
    assert_close(np.asarray(y).transpose(0, 3, 1, 2), expected, 1e-5)
    back = jbn.tools.torch_state_dict(variables, MAPPING)
    assert set(back) == set(block.state_dict())
    for name, tensor in block.state_dict().items():
        assert back[name].tobytes() == tensor.numpy().tobytes(), name
        assert back[name].dtype == tensor.numpy().dtype, name


def flax_arrays():
    """Every array with values of its own, so that no two of them can be swapped unseen."""
    with loosely():
        return variables_of(BasicBlock(), X)


def test_flax_to_torch_and_back_without_torch():
    variables = flax_arrays()
    state = jbn.tools.torch_state_dict(variables, MAPPING)
    assert_same(jbn.tools.from_torch_state_dict(state, MAPPING), variables)
    np.testing.assert_array_equal(state["bn2.running_var"], variables["batch_stats"]["BatchNorm_1"]["var"])


KERNELS = {  # PyTorch's and Flax's order: the output and input channels to the end, swapped
    "Dense": ((4, 3), (3, 4)),
    "Conv 1D": ((4, 3, 5), (5, 3, 4)),
    "Conv 2D": ((4, 3, 5, 2), (5, 2, 3, 4)),
    "Conv 3D": ((4, 3, 5, 2, 6), (5, 2, 6, 3, 4)),
    "depthwise": ((4, 1, 5, 2), (5, 2, 1, 4)),
}


@pytest.mark.parametrize(("theirs", "ours"), KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_kernels_of_every_rank(theirs, ours, dtype):
    weight = np.random.default_rng(0).standard_normal(theirs).astype(dtype)
    state, mapping = {"weight": weight, "bias": weight[:, 0].ravel()[:4]}, {"": ("head", 0)}
    variables = jbn.tools.from_torch_state_dict(state, mapping)
    kernel = np.moveaxis(weight, (1, 0), (-2, -1))
    assert kernel.shape == ours
    assert_same(variables, {"params": {"head": {"0": {"kernel": kernel, "bias": state["bias"]}}}})
    assert_same(jbn.tools.torch_state_dict(variables, mapping), state)


def test_nnx_modules():
    layers = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    model = nnx.Sequential(*layers)
    state = jbn.tools.torch_state_dict(model, {"fc": "layers/0", "bn": ("layers", 1)})
    np.testing.assert_array_equal(state["fc.weight"], layers[0].kernel[...].T)
    np.testing.assert_array_equal(state["bn.running_var"], layers[1].var[...])


@pytest.mark.parametrize("mapping", [MAPPING, {"": "Dense_0"}], ids=["model", "layer"])
def test_prefixed_names_of_data_parallel_models(mapping):
    weights = {"weight": X[0, 0], "bias": X[0, 0, :, 0]}
    state = weights if "" in mapping else jbn.tools.torch_state_dict(flax_arrays(), mapping)
    prefixed = {f"module.{name}": array for name, array in state.items()}
    variables = jbn.tools.from_torch_state_dict(prefixed, mapping, prefix="module.")
    assert_same(variables, jbn.tools.from_torch_state_dict(state, mapping))
    assert_same(jbn.tools.torch_state_dict(variables, mapping, prefix="module."), prefixed)


def without(name):
    return {module: path for module, path in MAPPING.items() if module != name}


def into_flax(mapping, **changed):
    state = jbn.tools.torch_state_dict(flax_arrays(), MAPPING)
    return jbn.tools.from_torch_state_dict(state | changed, mapping)


def prefixed_into_flax(prefix, **changed):
    state = jbn.tools.torch_state_dict(flax_arrays(), MAPPING, prefix="module.")
    return jbn.tools.from_torch_state_dict(state | changed, MAPPING, prefix=prefix)


KIND = (
    "Expected the arrays of a Conv, Dense or batch norm. Convert other kinds by hand, and leave them out of "
    "both sides."
)
COVER = (
    "Expected exactly what mapping names. Map each module that has arrays, and no other; take out what you "
    "convert by hand."
)
TEXTS = {
    "no mapping": (
        lambda: jbn.tools.from_torch_state_dict({}, ["conv"]),
        "jbn.tools.from_torch_state_dict: mapping is a list of 1. Expected a mapping of PyTorch "
        "modules to Flax modules. For example {'conv': 'Conv_0', 'bn': 'BatchNorm_0'}.",
    ),
    "a Flax module twice": (
        lambda: into_flax(MAPPING | {"bn2": ("BatchNorm_0",)}),
        "jbn.tools.from_torch_state_dict: mapping is one with BatchNorm_0 twice. Expected each Flax module "
        "once. A module that is shared, and listed twice by PyTorch, is one in Flax: take out the second.",
    ),
    "no state_dict": (
        lambda: jbn.tools.from_torch_state_dict(None, MAPPING),
        "jbn.tools.from_torch_state_dict: state_dict is None. Expected a mapping of names to arrays. Pass "
        "model.state_dict().",
    ),
    "PyTorch modules that are not mapped": (
        lambda: into_flax(without("bn2")),
        "jbn.tools.from_torch_state_dict: state_dict is one with the unmapped bn2.weight, bn2.bias, "
        f"bn2.running_mean, bn2.running_var. {COVER}",
    ),
    "Flax modules that are not mapped": (
        lambda: jbn.tools.torch_state_dict(flax_arrays(), without("bn2")),
        "jbn.tools.torch_state_dict: variables is one with the unmapped batch_stats/BatchNorm_1/mean, "
        "batch_stats/BatchNorm_1/var, params/BatchNorm_1/bias, params/BatchNorm_1/scale. " + COVER,
    ),
    "PyTorch modules with a prefix that is not said": (
        lambda: prefixed_into_flax(""),
        "jbn.tools.from_torch_state_dict: state_dict is one with the unmapped module.conv1.weight, "
        "module.bn1.weight, module.bn1.bias, module.bn1.running_mean, and 11 more and nothing of the mapped "
        "'conv1', 'bn1', 'conv2', 'bn2', and 2 more. Expected exactly what mapping names. Pass "
        "prefix='module.', with which every name begins.",
    ),
    "a name without the prefix": (
        lambda: prefixed_into_flax("module.", step=VECTOR),
        "jbn.tools.from_torch_state_dict: prefix is 'module.', missing in 1 of 16 names: step. Expected what "
        "each name in the state_dict begins with. Take out what you convert by hand, and leave prefix out "
        "where names have none.",
    ),
    "another prefix": (
        lambda: prefixed_into_flax("model."),
        "jbn.tools.from_torch_state_dict: prefix is 'model.', missing in 15 of 15 names: "
        "module.conv1.weight, module.bn1.weight, module.bn1.bias, module.bn1.running_mean, and 11 more. "
        "Expected what each name in the state_dict begins with. Pass prefix='module.', with which every name "
        "begins.",
    ),
    "a prefix that is no text": (
        lambda: prefixed_into_flax(("module",)),
        "jbn.tools.from_torch_state_dict: prefix is a tuple of 1. Expected what each name in the state_dict "
        "begins with. For example 'module.', as torch.nn.DataParallel has it.",
    ),
    "PyTorch modules that are not there": (
        lambda: into_flax(MAPPING | {"conv9": "Conv_9"}),
        f"jbn.tools.from_torch_state_dict: state_dict is one with nothing of the mapped 'conv9'. {COVER}",
    ),
    "Flax modules that are not there": (
        lambda: jbn.tools.torch_state_dict(flax_arrays(), MAPPING | {"conv9": "Conv_9"}),
        f"jbn.tools.torch_state_dict: variables is one with nothing of the mapped 'Conv_9'. {COVER}",
    ),
    "collections that PyTorch does not have": (
        lambda: jbn.tools.torch_state_dict(flax_arrays() | {"cache": {"Conv_0": {"a": X}}}, MAPPING),
        f"jbn.tools.torch_state_dict: variables is one with the unmapped cache/Conv_0/a. {COVER}",
    ),
    "a LayerNorm of PyTorch": (
        lambda: jbn.tools.from_torch_state_dict({"ln.weight": VECTOR, "ln.bias": VECTOR}, {"ln": "ln"}),
        "jbn.tools.from_torch_state_dict module 'ln': state_dict is weight float32[4], bias "
        "float32[4]. Expected the arrays of a Conv, Dense or batch norm. Convert other kinds by hand,"
        " and leave them out of both sides.",
    ),
    "a LayerNorm of Flax": (
        lambda: jbn.tools.torch_state_dict({"params": {"ln": {"scale": VECTOR}}}, {"ln": "ln"}),
        "jbn.tools.torch_state_dict module 'ln': params is scale float32[4]. Expected the arrays of a"
        " Conv, Dense or batch norm. Convert other kinds by hand, and leave them out of both sides.",
    ),
    "entries that a Conv does not have": (
        lambda: into_flax(MAPPING, **{"conv1.weight_g": X}),
        "jbn.tools.from_torch_state_dict module 'conv1': state_dict is weight float32[6,4,3,3], "
        "weight_g float32[2,8,8,4]. Expected the arrays of a Conv, Dense or batch norm. Convert other"
        " kinds by hand, and leave them out of both sides.",
    ),
    "a batch norm that lacks its variance": (
        lambda: jbn.tools.from_torch_state_dict({"bn.running_mean": VECTOR}, {"bn": "bn"}),
        "jbn.tools.from_torch_state_dict module 'bn': state is a mapping without running_var. "
        "Expected running_mean, running_var, and perhaps weight, bias, num_batches_tracked. Pass "
        "bn.state_dict() of one batch norm; one with track_running_stats=False has no statistics.",
    ),
}


class ResNet(nn.Module):
    """With the names of Flax's ImageNet example, and few channels."""

    sizes: tuple[int, ...]
    bottleneck: bool

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(jbn.linen.BatchNorm, use_running_average=True)
        x = nn.Conv(WIDTH, (7, 7), 2, 3, use_bias=False, name="conv_init")(x)
        x = nn.max_pool(nn.relu(norm(name="bn_init")(x)), (3, 3), (2, 2), ((1, 1), (1, 1)))
        block = BottleneckResNetBlock if self.bottleneck else ResNetBlock
        for layer, size in enumerate(self.sizes):
            for i in range(size):
                x = block(WIDTH * 2**layer, 2 if layer and not i else 1, norm)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class ResNetBlock(nn.Module):
    features: int
    strides: int
    norm: Any

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False)
        y = nn.relu(self.norm()(conv(self.features, (3, 3), self.strides, 1)(x)))
        y = self.norm()(conv(self.features, (3, 3), 1, 1)(y))
        if x.shape != y.shape:
            x = self.norm(name="norm_proj")(conv(self.features, (1, 1), self.strides, name="conv_proj")(x))
        return nn.relu(x + y)


class BottleneckResNetBlock(ResNetBlock):
    @nn.compact
    def __call__(self, x):
        conv, features = functools.partial(nn.Conv, use_bias=False), 4 * self.features
        y = nn.relu(self.norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(self.norm()(conv(self.features, (3, 3), self.strides, 1)(y)))
        y = self.norm()(conv(features, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm(name="norm_proj")(conv(features, (1, 1), self.strides, name="conv_proj")(x))
        return nn.relu(x + y)


def torchvision_state(sizes, bottleneck):
    """The names and shapes of torchvision's ResNet, with few channels; values tell the batch norms apart."""
    state = {}

    def conv_bn(conv, bn, into, out, size):
        state[f"{conv}.weight"] = np.zeros((out, into, size, size), np.float32)
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"{bn}.{name}"] = np.full(out, len(state), np.float32)
        state[f"{bn}.num_batches_tracked"] = np.array(7)

    conv_bn("conv1", "bn1", 3, WIDTH, 7)
    into = WIDTH
    for layer, size in enumerate(sizes):
        width = WIDTH * 2**layer
        convolutions = [(width, 1), (width, 3), (4 * width, 1)] if bottleneck else [(width, 3), (width, 3)]
        for block in range(size):
            before = into
            for i, (out, kernel) in enumerate(convolutions):
                name = f"layer{layer + 1}.{block}"
                conv_bn(f"{name}.conv{i + 1}", f"{name}.bn{i + 1}", into, out, kernel)
                into = out
            if not block and (layer or bottleneck):
                conv_bn(f"{name}.downsample.0", f"{name}.downsample.1", before, into, 1)
    return state | {"fc.weight": np.zeros((10, into), np.float32), "fc.bias": np.zeros(10, np.float32)}


def resnet_mapping(state):
    """That of the documentation."""
    page = ROOT / "docs/pages/migrate/torch.md"
    (source,) = (block for block in blocks(page, "python") if "def resnet_mapping" in block)
    exec(compile(source, page, "exec"), namespace := {})
    return namespace["resnet_mapping"](state)


@pytest.mark.parametrize(
    ("sizes", "bottleneck"),
    # The last has a block 10, which comes behind the block 9 and not behind the block 1.
    [((2, 2, 2, 2), False), ((3, 4, 6, 3), True), ((1, 1, 11, 1), False)],
    ids=["ResNet-18", "ResNet-50", "many blocks"],
)
def test_the_mapping_of_the_documentation_covers_the_resnets_of_torchvision(sizes, bottleneck):
    state = torchvision_state(sizes, bottleneck)
    state = {name: state[name] for name in sorted(state)}  # as safetensors keeps them
    variables = jbn.tools.from_torch_state_dict(state, resnet_mapping(state))
    counted = flatten_dict(variables)
    kept = unflatten_dict({path: leaf for path, leaf in counted.items() if path[-1] != "count"})
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    expected = jax.eval_shape(ResNet(sizes, bottleneck).init, jax.random.key(0), x)
    chex.assert_trees_all_equal_shapes_and_dtypes(kept, expected)
    kind = "BottleneckResNetBlock" if bottleneck else "ResNetBlock"
    order = [float(variables["params"][f"{kind}_{i}"]["BatchNorm_0"]["scale"][0]) for i in range(sum(sizes))]
    assert order == sorted(set(order))


def test_from_torch_to_a_folded_export(capsys):
    """The whole way of a model into deployment: no batch norm is left, and a batch may have any size."""
    rng = np.random.default_rng(0)
    state = {
        name: array
        if array.ndim == 0
        else rng.uniform(0.5, 1, array.shape).astype(np.float32) / array[0].size
        for name, array in torchvision_state((1, 1, 1, 1), bottleneck=False).items()
    }
    variables, model = (
        jbn.tools.from_torch_state_dict(state, resnet_mapping(state)),
        ResNet((1, 1, 1, 1), False),
    )
    x = rng.standard_normal((3, 16, 16, 3)).astype(np.float32)
    folded = jbn.tools.fold_variables(variables, call=model.apply, x=x)
    assert "no layer found" not in capsys.readouterr().out
    shape = export.symbolic_shape("batch, 16, 16, 3")
    exported = export.export(jax.jit(functools.partial(model.apply, folded)))(
        jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    for size in (1, 3):
        assert_close(exported.call(x[:size]), model.apply(variables, x[:size]), 1e-5)
