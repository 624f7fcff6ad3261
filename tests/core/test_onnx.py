"""Export to ONNX by jax2onnx, and what it leaves behind: evaluation runs in onnxruntime, and here as ever."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from tests.support.cases import loosely

X = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jbn.linen.BatchNorm(use_running_average=True, activation="relu")(nn.Conv(8, (3, 3))(x))


def linen():
    variables = Net().init(jax.random.key(0), X)
    shift = jnp.linspace(0.1, 1, 8)
    variables["batch_stats"] = jax.tree.map(lambda a: a + shift, variables["batch_stats"])
    return lambda x: Net().apply(variables, x)


def of_nnx():
    layer = jbn.nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.array([0.5, -1.0, 2.0])
    return layer


@pytest.mark.parametrize("make", [linen, of_nnx])
def test_an_exported_evaluation(make):
    jax2onnx, onnxruntime = (pytest.importorskip(name) for name in ("jax2onnx", "onnxruntime"))
    run = make()
    with loosely():
        exported = jax2onnx.to_onnx(run, [X.shape])
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: X})
    np.testing.assert_allclose(y, run(X), atol=2e-6)
    # What was traced under the patches of the exporter must not be found again.
    params, stats = jbn.init(3)
    for more in ({"activation": "relu"}, {"mask": np.arange(4) < 3}, {"residual": X}):
        for evaluating in (True, False):
            assert (
                jbn.batch_norm(params, stats, X, use_running_average=evaluating, **more)[0].shape == X.shape
            )
