"""Error texts of the layers in full: a person reads each of them here. `test_errors.py` compares them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx

X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, **options):
        return jbn.linen.BatchNorm(name="bn")(x, **options)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, **options):
        return Block(name="block")(x, **options)


class CalledWithTrain(nn.Module):
    """Its second positional argument means the opposite of ours."""

    @nn.compact
    def __call__(self, x, train):
        return x


class ModeByDefault(nn.Module):
    """Its calls without a mode evaluate; ours would not."""

    @nn.compact
    def __call__(self, x, use_running_average=True):
        return x


class WithGain(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable("batch_stats", "steps", jnp.zeros, ())
        return x * self.param("gain", nn.initializers.ones, x.shape)


class WithWeight(nnx.Module):
    def __init__(self):
        self.scale, self.bias = None, None
        self.mean, self.var = nnx.BatchStat(jnp.zeros(3)), nnx.BatchStat(jnp.ones(3))
        self.weight, self.count = nnx.Param(jnp.ones(3)), nnx.BatchStat(jnp.zeros(()))
        self.inner = nnx.Dict(gamma=nnx.Param(jnp.ones(3)))


def replace_within(model):
    variables = model.init(jax.random.key(0), X)
    with jbn.linen.replace_batch_norm(classes=(WithGain,)):
        model.apply(variables, X)


class OtherNames(nnx.Module):
    def __init__(self):
        self.gamma, self.bias = nnx.Param(jnp.ones(3)), None
        self.mean, self.var = nnx.BatchStat(jnp.zeros(3)), jnp.ones(3)


def nnx_layer(**settings):
    return jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **settings)


def apply(x=X, drop=(), mutable=(), layer=None, **options):
    net = layer or Net()
    variables = net.init(jax.random.key(0), X, use_running_average=True)
    variables = {name: tree for name, tree in variables.items() if name not in drop}
    return net.apply(variables, x, mutable=list(mutable), **options)


STALE = jbn.moments(np.ones((4, 2), np.float32))


def with_stale_moments():
    layer = jbn.linen.BatchNorm(use_running_average=False)
    x = np.ones((4, 3), np.float32)
    variables = layer.init(jax.random.key(0), x) | {"batch_moments": {"moments": STALE}}
    layer.apply(variables, x, mutable=["batch_stats", "batch_moments"])


def with_stale_moments_in_nnx():
    layer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    jbn.nnx.keep_batch_moments(layer)
    layer.batch_moments.set_value(STALE)
    layer(np.ones((4, 3), np.float32))


TEXTS = {
    "linen: immutable statistics": (
        lambda: apply(use_running_average=False),
        "jbn.linen.BatchNorm 'block/bn': batch_stats is immutable in training. Expected a collection "
        "that can be updated. Call apply(..., mutable=['batch_stats']) and keep the statistics it "
        "returns, or pass update_batch_stats=False or use_running_average=True.",
    ),
    "linen: missing statistics": (
        lambda: apply(drop=("batch_stats",), use_running_average=True),
        "jbn.linen.BatchNorm 'block/bn': batch_stats is missing. Expected the collection that init "
        "returned, or that training updated. Pass it beside the parameters: apply({'params': params, "
        "'batch_stats': batch_stats}, ...).",
    ),
    "linen: missing mode": (
        lambda: apply(mutable=["batch_stats"]),
        "jbn.linen.BatchNorm 'block/bn': use_running_average is missing. Expected it in the "
        "constructor or in the call, once. Pass use_running_average=False in training and True in "
        "evaluation.",
    ),
    "linen: mode said twice": (
        lambda: jbn.linen.BatchNorm(True).init(jax.random.key(0), X, use_running_average=True),
        "jbn.linen.BatchNorm: use_running_average is given twice. Expected it in the constructor or "
        "in the call, once. Pass use_running_average=False in training and True in evaluation.",
    ),
    "linen: mode as a number": (
        lambda: apply(use_running_average=1, mutable=["batch_stats"]),
        "jbn.linen.BatchNorm 'block/bn': use_running_average is 1. Expected True (evaluation) or "
        "False (training). Pass a bool, or a bool array of shape ().",
    ),
    "linen: a traced mode with immutable statistics": (
        lambda: jax.jit(lambda flag: apply(use_running_average=flag))(True),
        "jbn.linen.BatchNorm 'block/bn': batch_stats is immutable in training. Expected a collection "
        "that can be updated. Call apply(..., mutable=['batch_stats']) and keep the statistics it "
        "returns, or pass update_batch_stats=False or use_running_average=True.",
    ),
    "linen: a traced choice to write": (
        lambda: jax.jit(lambda flag: apply(use_running_average=False, update_batch_stats=flag))(True),
        "jbn.linen.BatchNorm 'block/bn': update_batch_stats is bool[]. Expected True or False. Under "
        "jit make it static, jax.jit(..., static_argnames='update_batch_stats'), or close over it.",
    ),
    "linen: frozen as text": (
        lambda: jbn.linen.BatchNorm(True, frozen="False").init(jax.random.key(0), X),
        "jbn.linen.BatchNorm: frozen is 'False'. Expected True or False. Under jit make it static, "
        "jax.jit(..., static_argnames='frozen'), or close over it.",
    ),
    "linen: frozen, traced": (
        lambda: jax.jit(lambda frozen: jbn.linen.BatchNorm(True, frozen=frozen).init(jax.random.key(0), X))(
            True
        ),
        "jbn.linen.BatchNorm: frozen is bool[]. Expected True or False. Under jit make it static, "
        "jax.jit(..., static_argnames='frozen'), or close over it.",
    ),
    "linen: statistics of another size": (
        lambda: jbn.linen.BatchNorm(True, use_scale=False, use_bias=False).apply(
            {"batch_stats": jbn.init(4)[1]}, X
        ),
        "jbn.linen.BatchNorm: batch_stats['mean'] is float32[4]. Expected shape (3,). Make them for "
        "as many features as x has (jbn.init(features), num_features), or set axis to x's feature "
        "axis.",
    ),
    "linen: axis out of range": (
        lambda: jbn.linen.BatchNorm(True, axis=2).init(jax.random.key(0), X),
        "jbn.linen.BatchNorm: axis is 2. Expected one or several different axes of x = float32[8,3]. "
        "Name the feature axes: -1 for NHWC, 1 for NCHW.",
    ),
    "linen: mask of other examples": (
        lambda: apply(use_running_average=False, mask=np.ones(5, bool), mutable=["batch_stats"]),
        "jbn.linen.BatchNorm 'block/bn': mask is bool[5] for x = float32[8,3]. Expected as many axes,"
        " each 1 or x's size, or shape (8,) or a leading part of it. True marks what takes part: mask"
        " = jnp.arange(x.shape[0]) < number_of_examples.",
    ),
    "linen: unbound axis": (
        lambda: jbn.linen.BatchNorm(False, axis_name="data").apply(
            jbn.linen.BatchNorm(False).init(jax.random.key(0), X), X, mutable=["batch_stats"]
        ),
        "jbn.linen.BatchNorm: axis_name is 'data', which nothing around the call binds. Expected a "
        "name bound by shard_map, pmap or vmap. Run the training step inside one of them with this "
        "axis name, or leave axis_name out: under jit, sharded arrays are synchronised without it.",
    ),
    "linen: unknown override": (
        lambda: jbn.linen.replace_batch_norm(axis_nane="data").__enter__(),
        "jbn.linen.replace_batch_norm: overrides is axis_nane. Expected fields of jbn.linen.BatchNorm"
        " (activation, axis, axis_index_groups, axis_name, bias_init, blend, debias, dtype, epsilon, "
        "force_float32_reductions, frozen, mean_init, momentum, param_dtype, renorm, scale_init, "
        "skip_nonfinite, unbiased, use_bias, use_fast_variance, use_running_average, use_scale, "
        "var_init, virtual_batch_size). Check the spelling.",
    ),
    "nnx: missing mode": (
        lambda: nnx_layer(use_running_average=None)(X),
        "jbn.nnx.BatchNorm of 3 features: use_running_average is missing. Expected it in the "
        "constructor or in the call. Call model.train() or model.eval(), or pass "
        "use_running_average=False in training and True in evaluation.",
    ),
    "nnx: mode as a number": (
        lambda: nnx_layer()(X, use_running_average=1),
        "jbn.nnx.BatchNorm of 3 features: use_running_average is 1. Expected True (evaluation) or "
        "False (training). Pass a bool, or a bool array of shape ().",
    ),
    "nnx: a traced choice to write": (
        lambda: nnx.jit(lambda layer, flag: layer(X, update_batch_stats=flag))(nnx_layer(), True),
        "jbn.nnx.BatchNorm of 3 features: update_batch_stats is bool[]. Expected True or False. Under"
        " jit make it static, jax.jit(..., static_argnames='update_batch_stats'), or close over it.",
    ),
    "nnx: frozen as a number": (
        lambda: nnx_layer(frozen=1)(X),
        "jbn.nnx.BatchNorm of 3 features: frozen is 1. Expected True or False. Under jit make it static, "
        "jax.jit(..., static_argnames='frozen'), or close over it.",
    ),
    "nnx: frozen, traced": (
        lambda: jax.jit(lambda frozen: jbn.nnx.replace_batch_norm(nnx_layer(), frozen=frozen)(X))(True),
        "jbn.nnx.BatchNorm of 3 features: frozen is bool[]. Expected True or False. Under jit make it "
        "static, jax.jit(..., static_argnames='frozen'), or close over it.",
    ),
    "nnx: x of another size": (
        lambda: nnx_layer()(X[:, :2]),
        "jbn.nnx.BatchNorm of 3 features: params['scale'] is float32[3]. Expected shape (2,), or one "
        "of 2 axes that broadcasts to x = float32[8,2]. Make them for as many features as x has "
        "(jbn.init(features), num_features), or set axis to x's feature axis.",
    ),
    "nnx: axis out of range": (
        lambda: nnx_layer(axis=2)(X),
        "jbn.nnx.BatchNorm of 3 features: axis is 2. Expected one or several different axes of x = "
        "float32[8,3]. Name the feature axes: -1 for NHWC, 1 for NCHW.",
    ),
    "nnx: mask of other examples": (
        lambda: nnx_layer()(X, mask=np.ones(5, bool)),
        "jbn.nnx.BatchNorm of 3 features: mask is bool[5] for x = float32[8,3]. Expected as many "
        "axes, each 1 or x's size, or shape (8,) or a leading part of it. True marks what takes part:"
        " mask = jnp.arange(x.shape[0]) < number_of_examples.",
    ),
    "nnx: unbound axis": (
        lambda: nnx_layer(axis_name="data")(X),
        "jbn.nnx.BatchNorm of 3 features: axis_name is 'data', which nothing around the call binds. "
        "Expected a name bound by shard_map, pmap or vmap. Run the training step inside one of them "
        "with this axis name, or leave axis_name out: under jit, sharded arrays are synchronised "
        "without it.",
    ),
    "nnx: groups under vmap": (
        lambda: jax.vmap(nnx_layer(axis_name="data", axis_index_groups=[[0, 1], [2, 3]]), axis_name="data")(
            jnp.ones((4, 2, 3), np.float32)
        ),
        "jbn.nnx.BatchNorm of 3 features: axis_index_groups is ((0, 1), (2, 3)) under vmap, or under "
        "shard_map with check_vma=True. Expected None there, where JAX cannot group devices. Split "
        "the axis in two, for example a mesh of shape (groups, devices per group), and pass the name "
        "of the second as axis_name.",
    ),
    "nnx: unknown override": (
        lambda: jbn.nnx.replace_batch_norm(nnx_layer(), axis_nane="data"),
        "jbn.nnx.replace_batch_norm: overrides is axis_nane. Expected settings of jbn.nnx.BatchNorm "
        "(use_running_average, axis, momentum, epsilon, dtype, axis_name, axis_index_groups, "
        "use_fast_variance, promote_dtype, frozen, unbiased, debias, skip_nonfinite, "
        "virtual_batch_size, renorm, activation, blend). Check the spelling.",
    ),
    "nnx: an override that needs counts": (
        lambda: jbn.nnx.replace_batch_norm(nnx_layer(), momentum=None),
        "jbn.nnx.replace_batch_norm: overrides is momentum=None or debias=True. Expected layers that have "
        "counted their updates from the first one. Make the model with jbn.nnx.BatchNorm and this option, "
        "and load its variables.",
    ),
    "linen: a where of another kind": (
        lambda: jbn.linen.replace_batch_norm(3).__enter__(),
        "jbn.linen.replace_batch_norm: where is 3. Expected a glob on the paths of layers, a predicate of a "
        'path, or None. For example where="backbone/*", or where=lambda path: path.startswith("backbone").',
    ),
    "nnx: classes that are none": (
        lambda: jbn.nnx.replace_batch_norm(nnx_layer(), classes=(3,)),
        "jbn.nnx.replace_batch_norm: classes is (3,). Expected a tuple of classes of modules. For example "
        "classes=(TheirBatchNorm,).",
    ),
    "linen: a class that is called in another way": (
        lambda: jbn.linen.replace_batch_norm(classes=(CalledWithTrain,)).__enter__(),
        "jbn.linen.replace_batch_norm: classes is one with CalledWithTrain, called with (x, train). Expected "
        "classes that are called with (x, use_running_average=None, *, mask=None, residual=None, "
        "update_batch_stats=True), or with less of it. Let its call be as that of Flax's layer: the mode "
        "comes behind x, and is None by default.",
    ),
    "linen: a class with a mode by default": (
        lambda: jbn.linen.replace_batch_norm(classes=(ModeByDefault,)).__enter__(),
        "jbn.linen.replace_batch_norm: classes is one with ModeByDefault, called with (x, "
        "use_running_average=True). Expected classes that are called with (x, use_running_average=None, *, "
        "mask=None, residual=None, update_batch_stats=True), or with less of it. Let its call be as that of "
        "Flax's layer: the mode comes behind x, and is None by default.",
    ),
    "linen: a class with a parameter of another name": (
        lambda: replace_within(WithGain()),
        "jbn.linen.replace_batch_norm: classes is one with WithGain, which has params['gain'], "
        "batch_stats['steps']. Expected classes with at most scale and bias in params, and mean and var in "
        "batch_stats. Give them these names in the class, or leave it out.",
    ),
    "linen: a class with a parameter of another name, in a model": (
        lambda: replace_within(nn.Sequential([WithGain()])),
        "jbn.linen.replace_batch_norm 'layers_0': classes is one with WithGain, which has params['gain'], "
        "batch_stats['steps']. Expected classes with at most scale and bias in params, and mean and var in "
        "batch_stats. Give them these names in the class, or leave it out.",
    ),
    "nnx: a class with more variables": (
        lambda: jbn.nnx.replace_batch_norm(WithWeight(), classes=(WithWeight,)),
        "jbn.nnx.replace_batch_norm: classes is one with WithWeight, which has the variables count, "
        "inner/gamma, weight. Expected classes with the variables mean, var, scale and bias, the last two "
        "None where a layer has none, and no others. Give them these names in the class.",
    ),
    "nnx: a class with variables of other names": (
        lambda: jbn.nnx.replace_batch_norm(OtherNames(), classes=(OtherNames,)),
        "jbn.nnx.replace_batch_norm: classes is one with OtherNames, which has no variable var, scale "
        "and has the variables gamma. Expected classes with the variables mean, var, scale and bias, the "
        "last two None where a layer has none, and no others. Give them these names in the class.",
    ),
    "linen: moments of another shape": (
        with_stale_moments,
        "jbn.linen.BatchNorm: moments is (float32[2], float32[3]). Expected one or more jbn.Moments of one "
        "shape. Merge the moments of one layer, as from jbn.moments(x).",
    ),
    "nnx: moments of another shape": (
        with_stale_moments_in_nnx,
        "jbn.nnx.BatchNorm of 3 features: moments is (float32[2], float32[3]). Expected one or more "
        "jbn.Moments of one shape. Merge the moments of one layer, as from jbn.moments(x).",
    ),
}
