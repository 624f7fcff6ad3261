"""A torchvision-shaped ResNet block into Flax and back: bit-equal arrays, the same outputs in evaluation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn.linen
import jbn.tools
from tests.cases import assert_close, loosely

X = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
MAPPING = {
    "conv1": "Conv_0",
    "bn1": "BatchNorm_0",
    "conv2": "Conv_1",
    "bn2": "BatchNorm_1",
    "downsample.0": "Conv_2",
    "downsample.1": "BatchNorm_2",
}


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
    with loosely():
        variables = BasicBlock().init(jax.random.key(0), X)
    return jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(1), leaf.shape), variables)


def test_flax_to_torch_and_back_without_torch():
    variables = flax_arrays()
    state = jbn.tools.torch_state_dict(variables, MAPPING)
    assert state["conv1.weight"].shape == (6, 4, 3, 3)
    back = jbn.tools.from_torch_state_dict(state, MAPPING)
    for one, other in zip(jax.tree.leaves(variables), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("left_out", ["conv2", "bn2"])
def test_what_no_module_has_is_an_error_by_name(left_out):
    mapping = {name: path for name, path in MAPPING.items() if name != left_out}
    state = jbn.tools.torch_state_dict(flax_arrays(), MAPPING)
    with pytest.raises(ValueError, match=f"{left_out}.weight"):
        jbn.tools.from_torch_state_dict(state, mapping)
    with pytest.raises(ValueError, match=MAPPING[left_out]):
        jbn.tools.torch_state_dict(flax_arrays(), mapping)


def test_a_module_that_is_missing_is_an_error_by_name():
    state = jbn.tools.torch_state_dict(flax_arrays(), MAPPING)
    with pytest.raises(ValueError, match="conv9"):
        jbn.tools.from_torch_state_dict(state, MAPPING | {"conv9": "Conv_9"})


def test_dense_kernels_are_transposed():
    variables = {"params": {"head": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)}}}
    state = jbn.tools.torch_state_dict(variables, {"fc": "head"})
    np.testing.assert_array_equal(state["fc.weight"], np.arange(6.0).reshape(2, 3).T)
