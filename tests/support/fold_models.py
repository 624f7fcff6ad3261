"""Layers before batch norms, with random values, and small models of both: shared by the tests of folding."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jbn.tools import fold_variables
from tests.support.cases import assert_close, tolerance

PARTS = {
    "scale and bias": (True, True),
    "scale": (True, False),
    "bias": (False, True),
    "neither": (False, False),
}
TOLERANCE = tolerance(np.float32)
EPSILON = 1e-2  # not the default, and large enough to show in every value

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


def norm(parts=(True, True), **settings):
    return nn.BatchNorm(True, use_scale=parts[0], use_bias=parts[1], epsilon=EPSILON, **settings)


class Net(nn.Module):
    """A model of one function of x, in which modules are made."""

    run: callable

    @nn.compact
    def __call__(self, x):
        return self.run(x)


def net(run=lambda x: norm()(nn.Dense(3)(x)), x=None):
    """A `Net`, its variables, and its input."""
    model, x = Net(run), random(4, 3) if x is None else x
    return model, variables_of(model, x), x


def assert_folds(run, x=None, pairs=None, accuracy=TOLERANCE):
    """Folding leaves the structure and the outputs of a `Net` as they were. Returns what it gives."""
    model, variables, x = net(run, x)
    folded = fold_variables(variables, pairs, call=model.apply, x=x)
    assert jax.tree.structure(folded) == jax.tree.structure(variables)
    y, expected = (model.apply(tree, x) for tree in (folded, variables))
    assert y.dtype == expected.dtype
    assert_close(y, expected, accuracy)
    return folded


def collections(model):
    """The variables of an NNX module as those of a linen one; of a linen one as they are."""
    if not isinstance(model, nnx.Module):
        return model
    states = {"params": nnx.state(model, nnx.Param), "batch_stats": nnx.state(model, nnx.BatchStat)}
    return {name: nnx.to_pure_dict(state) for name, state in states.items()}


def fill_nnx(model, trees):
    """Gives the module these values, collection by collection."""
    for kind, name in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
        state = nnx.state(model, kind)
        nnx.replace_by_pure_dict(state, trees[name])
        nnx.update(model, state)
    return model


def shared(x):
    """A layer that runs twice."""
    dense = nn.Dense(3)
    return norm()(dense(nn.relu(dense(x))))


def twice_normalized(x):
    """Two batch norms behind one layer."""
    y = nn.Dense(3)(x)
    return norm()(y) + norm(axis=-1)(y)


class Step(nn.Module):
    """A pair, as nn.scan takes it."""

    @nn.compact
    def __call__(self, x, _):
        return norm()(nn.Dense(3)(x)), None


def stacked(kind):
    axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    if kind == "scan":
        return lambda x: nn.scan(Step, length=3, **axes)()(x, None)[0]
    return lambda x: nn.vmap(Step, in_axes=(0, None), **axes)()(x[None].repeat(3, 0), None)[0]
