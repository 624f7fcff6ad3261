"""What PyTorch's tensors bring along: dtypes, shared memory, a counter; and layers that take them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn.linen
import jbn.nnx
from jbn.tools import from_torch, to_torch
from tests.support.cases import assert_close, loosely
from tests.support.foreign import EVALUATION, FEATURES, SOME, Torch, assert_same, batch


def test_tensors_of_every_kind():
    layer = Torch(SOME)
    torch = layer.torch
    with torch.no_grad():
        bn = layer.bn.to(torch.bfloat16)
    tensors = {**dict(bn.named_parameters()), **dict(bn.named_buffers())}
    assert tensors["weight"].requires_grad
    params, batch_stats = from_torch(tensors)
    arrays = to_torch(params, batch_stats)
    for name in ("weight", "bias", "running_mean", "running_var"):
        back = torch.from_numpy(arrays[name].view("int16")).view(torch.bfloat16)
        assert torch.equal(back, tensors[name]), name
    assert params["scale"].dtype == batch_stats["var"].dtype == jnp.bfloat16


def test_double_precision_is_kept_or_refused(x64):
    state = Torch(SOME).bn.double().state_dict()
    params, batch_stats = from_torch(state)
    assert params["scale"].dtype == batch_stats["mean"].dtype == np.float64
    assert_same(to_torch(params, batch_stats), {name: tensor.numpy() for name, tensor in state.items()})
    with jax.enable_x64(False), pytest.raises(ValueError, match="dtype that JAX keeps"):
        from_torch(state)


def test_what_comes_over_is_a_copy():
    layer = Torch(SOME)
    before = jax.tree.map(np.array, from_torch(layer.bn.state_dict()))
    converted = from_torch(layer.bn.state_dict())
    arrays = to_torch(*converted)
    with layer.torch.no_grad():
        for tensor in layer.bn.state_dict().values():
            tensor.zero_()
    for array in arrays.values():
        array[...] = 0
    assert_same(converted, before)


def test_without_a_counter_there_is_none_and_torch_keeps_its_own():
    layer = Torch(SOME)
    state = layer.arrays
    del state["num_batches_tracked"]
    params, batch_stats = from_torch(state)
    assert sorted(batch_stats) == ["mean", "var"]
    assert_same(layer.put(params, batch_stats), state)
    assert layer.bn.num_batches_tracked == SOME


def test_layers_take_what_comes_over():
    layer, x = Torch(SOME), batch(100)
    params, batch_stats = layer.take()
    expected = np.moveaxis(layer.evaluate(batch(100, layer.axis)), layer.axis, -1)
    variables = {"params": params, "batch_stats": batch_stats}
    for kind in (jbn.linen.BatchNorm, nn.BatchNorm):
        with loosely():
            y = kind(use_running_average=True, **layer.settings).apply(variables, x)
        assert_close(y, expected, EVALUATION)
    ours = jbn.nnx.BatchNorm(FEATURES, use_running_average=True, **layer.settings, rngs=nnx.Rngs(0))
    for name, value in {**params, "mean": batch_stats["mean"], "var": batch_stats["var"]}.items():
        getattr(ours, name)[...] = value
    assert_close(ours(x), expected, EVALUATION)
