"""Error texts of `batch_norm` in full: a person reads each of them here. `test_errors.py` compares them."""

from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import Partitioned

import jbn

X = np.zeros((8, 4, 3), np.float32)
PARAMS, STATS = jbn.init(3)


def call(x=X, params=PARAMS, batch_stats=STATS, use_running_average=False, **settings):
    return jbn.batch_norm(params, batch_stats, x, use_running_average=use_running_average, **settings)


TEXTS = {
    "x of text": (
        lambda: call(x=np.array(["a"])),
        "jbn.batch_norm: x is <U1[1]. Expected an array of numbers with at least one axis. Convert it first.",
    ),
    "x without axes": (
        lambda: call(x=np.float32(1)),
        "jbn.batch_norm: x is float32[]. Expected an array of numbers with at least one axis. "
        "Convert it first.",
    ),
    "x of random keys": (
        lambda: call(x=jax.random.key(0)[None]),
        "jbn.batch_norm: x is key<fry>[1]. Expected an array of numbers with at least one axis."
        " Convert it first.",
    ),
    "axis out of range": (
        lambda: call(axis=3),
        "jbn.batch_norm: axis is 3. Expected one or several different axes of x = "
        "float32[8,4,3]. Name the feature axes: -1 for NHWC, 1 for NCHW.",
    ),
    "axis twice": (
        lambda: call(axis=(0, -3)),
        "jbn.batch_norm: axis is (0, -3). Expected one or several different axes of x = "
        "float32[8,4,3]. Name the feature axes: -1 for NHWC, 1 for NCHW.",
    ),
    "axis of text": (
        lambda: call(axis="C"),
        "jbn.batch_norm: axis is 'C'. Expected one or several different axes of x = "
        "float32[8,4,3]. Name the feature axes: -1 for NHWC, 1 for NCHW.",
    ),
    "foreign params": (
        lambda: call(params={"gamma": 1}),
        "jbn.batch_norm: params is a mapping with gamma. Expected only scale, bias. "
        "Pass the collection of one layer, for example variables['params']['BatchNorm_0'].",
    ),
    "params and batch_stats, swapped": (
        lambda: call(params=STATS, batch_stats=PARAMS),
        "jbn.batch_norm: params is a mapping with mean, var. Expected only scale, bias. Is it swapped with "
        "the other? params come first, then batch_stats.",
    ),
    "a boxed parameter": (
        lambda: call(params={"scale": Partitioned(jnp.ones(3), ("model",))}),
        "jbn.batch_norm: params['scale'] is a Partitioned. Expected an array of numbers. Take the arrays "
        "out of their boxes: flax.linen.unbox(variables).",
    ),
    "statistics of all of x": (
        lambda: call(batch_stats=jbn.init(X.shape)[1]),
        "jbn.batch_norm: batch_stats['mean'] is float32[8,4,3]. Expected shape (3,). jbn.init takes the "
        "number of channels, usually x.shape[-1], and not x.shape.",
    ),
    "an axis as its name": (
        lambda: call(axis_name=0),
        "jbn.batch_norm: axis_name is 0. Expected the name that vmap, pmap or a mesh gave an axis. A number "
        "is an axis of x: that of the features is axis.",
    ),
    "negative weights": (
        lambda: call(mask=np.float32([1, 1, 1, 1, 0, 0, 0, -1])),
        "jbn.batch_norm: mask is float32[8] with weights below 0. Expected weights from 0 up. 0 marks what "
        "takes no part.",
    ),
    "statistics by names and numbers": (
        lambda: call(batch_stats={"mean": STATS["mean"], 1: STATS["var"]}),
        "jbn.batch_norm: batch_stats is a mapping with 1. Expected only mean, var, count, rows. Pass the "
        "collection of one layer, for example variables['batch_stats']['BatchNorm_0'].",
    ),
    "params of a model": (
        lambda: call(params={"BatchNorm_0": PARAMS}),
        "jbn.batch_norm: params is a mapping with BatchNorm_0. Expected only scale, "
        "bias. Pass the collection of one layer, for example "
        "variables['params']['BatchNorm_0'].",
    ),
    "params that are none": (
        lambda: call(params=[1]),
        "jbn.batch_norm: params is [1]. Expected a dict or FrozenDict with scale, bias. See jbn.init.",
    ),
    "parameters in a list": (
        lambda: call(params={"scale": [1.0, 1.0, 1.0]}),
        "jbn.batch_norm: params['scale'] is [1.0, 1.0, 1.0]. Expected an array of numbers. Leave out "
        "what the layer does not have; convert lists with jnp.asarray.",
    ),
    "a parameter that is none": (
        lambda: call(params={"scale": None}),
        "jbn.batch_norm: params['scale'] is None. Expected an array of numbers. Leave out what the "
        "layer does not have; convert lists with jnp.asarray.",
    ),
    "statistics that JAX cannot look into": (
        lambda: call(batch_stats=MappingProxyType(STATS)),
        "jbn.batch_norm: batch_stats is mappingproxy({'mean': Array([0., 0., 0.], dtype=float32), "
        "'var': Array([1., 1., 1.], dtype=float32)}). Expected a dict or FrozenDict with mean, var, "
        "count, rows. See jbn.init.",
    ),
    "statistics of integers": (
        lambda: call(batch_stats={"mean": STATS["mean"], "var": np.ones(3, np.int32)}),
        "jbn.batch_norm: batch_stats['var'] is int32[3]. Expected a floating dtype. Averages are kept"
        " in float32, the number of updates in int32.",
    ),
    "params of another size": (
        lambda: call(params=jbn.init(4)[0]),
        "jbn.batch_norm: params['scale'] is float32[4]. Expected shape (3,), or one of 3 axes that "
        "broadcasts to x = float32[8,4,3]. Make them for as many features as x has "
        "(jbn.init(features), num_features), or set axis to x's feature axis.",
    ),
    "statistics without a variance": (
        lambda: call(batch_stats={"mean": STATS["mean"]}),
        "jbn.batch_norm: batch_stats is a mapping with mean. Expected mean and var. See jbn.init.",
    ),
    "statistics of a model": (
        lambda: call(batch_stats={"BatchNorm_0": STATS}),
        "jbn.batch_norm: batch_stats is a mapping with BatchNorm_0. Expected only mean,"
        " var, count, rows. Pass the collection of one layer, for example "
        "variables['batch_stats']['BatchNorm_0'].",
    ),
    "statistics of another size": (
        lambda: call(batch_stats=jbn.init(4)[1]),
        "jbn.batch_norm: batch_stats['mean'] is float32[4]. Expected shape (3,). Make them for as "
        "many features as x has (jbn.init(features), num_features), or set axis to x's feature axis.",
    ),
    "a real mean for complex x": (
        lambda: call(x=X.astype(np.complex64)),
        "jbn.batch_norm: batch_stats['mean'] is float32[3]. Expected a complex dtype for x = "
        "complex64[8,4,3]. Cast it: mean.astype(jnp.complex64).",
    ),
    "momentum too large": (
        lambda: call(momentum=1.5),
        "jbn.batch_norm: momentum is 1.5. Expected a number from 0 to 1, a scalar array, or None "
        "(cumulative). It weighs the old statistics: PyTorch's momentum=0.1 is 0.9 here.",
    ),
    "momentum per channel": (
        lambda: call(momentum=jnp.ones(3)),
        "jbn.batch_norm: momentum is float32[3]. Expected a number from 0 to 1, a scalar array, or "
        "None (cumulative). It weighs the old statistics: PyTorch's momentum=0.1 is 0.9 here.",
    ),
    "momentum of text": (
        lambda: call(momentum="0.9"),
        "jbn.batch_norm: momentum is '0.9'. Expected a number from 0 to 1, a scalar array, or None "
        "(cumulative). It weighs the old statistics: PyTorch's momentum=0.1 is 0.9 here.",
    ),
    "negative epsilon": (
        lambda: call(epsilon=-1.0),
        "jbn.batch_norm: epsilon is -1.0. Expected a static number from 0 up. The usual one is 1e-5.",
    ),
    "traced epsilon": (
        lambda: jax.jit(lambda e: call(epsilon=e))(np.float32(1)),
        "jbn.batch_norm: epsilon is float32[]. Expected a static number from 0 up. The usual one is 1e-5.",
    ),
    "integer dtype": (
        lambda: call(dtype=np.int32),
        "jbn.batch_norm: dtype is <class 'numpy.int32'>. Expected a floating dtype. Convert y "
        "afterwards if that is meant.",
    ),
    "unknown dtype": (
        lambda: call(dtype="half-ish"),
        "jbn.batch_norm: dtype is 'half-ish'. Expected a floating dtype. Convert y afterwards "
        "if that is meant.",
    ),
    "real dtype for complex x": (
        lambda: call(x=X.astype(np.complex64), batch_stats=None, dtype=np.float32),
        "jbn.batch_norm: dtype is <class 'numpy.float32'>. Expected a complex dtype. Convert y "
        "afterwards if that is meant.",
    ),
    "mode as a number": (
        lambda: call(use_running_average=1),
        "jbn.batch_norm: use_running_average is 1. Expected True (evaluation) or False "
        "(training). Pass a bool, or a bool array of shape ().",
    ),
    "mode per example": (
        lambda: call(use_running_average=jnp.ones(8, bool)),
        "jbn.batch_norm: use_running_average is bool[8]. Expected True (evaluation) or False "
        "(training). Pass a bool, or a bool array of shape ().",
    ),
    "mask of other examples": (
        lambda: call(mask=np.ones(3, bool)),
        "jbn.batch_norm: mask is bool[3] for x = float32[8,4,3]. Expected as many axes, each 1 "
        "or x's size, or shape (8, 4) or a leading part of it. True marks what takes part: mask"
        " = jnp.arange(x.shape[0]) < number_of_examples.",
    ),
    "mask of too many axes": (
        lambda: call(mask=np.ones((8, 4, 3, 1), bool)),
        "jbn.batch_norm: mask is bool[8,4,3,1] for x = float32[8,4,3]. Expected as many axes, "
        "each 1 or x's size, or shape (8, 4) or a leading part of it. True marks what takes "
        "part: mask = jnp.arange(x.shape[0]) < number_of_examples.",
    ),
    "complex mask": (
        lambda: call(mask=np.ones(8, np.complex64)),
        "jbn.batch_norm: mask is complex64[8]. Expected an array of bool or float. Compare it: mask > 0.",
    ),
    "mask of text": (
        lambda: call(mask="all"),
        "jbn.batch_norm: mask is 'all'. Expected an array of bool or float. Compare it: mask > 0.",
    ),
    "one value per channel": (
        lambda: call(x=X[:1, :1]),
        "jbn.batch_norm: x is float32[1,1,3], one value per channel. Expected a batch of at "
        "least two values per channel in training. A single value has no variance and would "
        "turn into bias: use a larger batch, use_running_average=True, or axis_name to "
        "normalize over several devices.",
    ),
    "groups without an axis": (
        lambda: call(axis_index_groups=[[0], [1]]),
        "jbn.batch_norm: axis_index_groups is [[0], [1]] with axis_name=None. Expected groups "
        "of equal size of the indices of a named axis. For example axis_name='data', "
        "axis_index_groups=[[0, 1], [2, 3]].",
    ),
    "unequal groups": (
        lambda: call(axis_name="data", axis_index_groups=[[0, 1], [2]]),
        "jbn.batch_norm: axis_index_groups is [[0, 1], [2]] with axis_name='data'. Expected "
        "groups of equal size of the indices of a named axis. For example axis_name='data', "
        "axis_index_groups=[[0, 1], [2, 3]].",
    ),
    "groups under vmap": (
        lambda: jax.vmap(
            lambda x: call(x=x, axis_name="data", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]]),
            axis_name="data",
        )(X),
        "jbn.batch_norm: axis_index_groups is ((0, 1, 2, 3), (4, 5, 6, 7)) under vmap, or under "
        "shard_map with check_vma=True. Expected None there, where JAX cannot group devices. Split "
        "the axis in two, for example a mesh of shape (groups, devices per group), and pass the name "
        "of the second as axis_name.",
    ),
    "groups without some of the devices": (
        lambda: jax.vmap(
            lambda x: call(x=x, axis_name="data", axis_index_groups=[[0, 1], [2, 3]]), axis_name="data"
        )(X),
        "jbn.batch_norm: axis_index_groups is ((0, 1), (2, 3)) for the 8 devices of 'data'. Expected each "
        "index in one group. For example axis_name='data', axis_index_groups=[[0, 1], [2, 3]].",
    ),
    "unbound axis": (
        lambda: call(axis_name="data"),
        "jbn.batch_norm: axis_name is 'data', which nothing around the call binds. Expected a "
        "name bound by shard_map, pmap or vmap. Run the training step inside one of them with "
        "this axis name, or leave axis_name out: under jit, sharded arrays are synchronised "
        "without it.",
    ),
}
