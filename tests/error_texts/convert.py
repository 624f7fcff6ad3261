"""Wrong calls of the conversions, and the whole text of each error."""

import jax.numpy as jnp
import numpy as np

import jbn
from jbn.tools import (
    from_equinox,
    from_haiku,
    from_keras,
    from_torch,
    settings_from,
    settings_to,
    to_equinox,
    to_haiku,
    to_keras,
    to_torch,
)

VECTOR, COUNTER = np.zeros(3, np.float32), np.array(4)
STATE = {"weight": VECTOR, "bias": VECTOR, "running_mean": VECTOR, "running_var": VECTOR}
EMA = {"hidden": VECTOR, "average": VECTOR, "counter": COUNTER}
PARAMS, STATS = jbn.init(3)
COUNTED = {**STATS, "count": jnp.int32(4)}
BN = "Pass bn.state_dict() of one batch norm; one with track_running_stats=False has no statistics."
COLLECTIONS = "Pass the collections of one layer, for example variables['params']['BatchNorm_0']."
TAKE = "The docstring of from_equinox shows how to take them out of a layer and its State."
LEAVE = "Leave out what has no counterpart, once you know that nothing is lost with it."
TEXTS = {
    "from_torch of a whole model": (
        lambda: from_torch({f"layer{number}.bn.weight": VECTOR for number in range(6)}),
        "jbn.tools.from_torch: state is one of a whole model, with layer0.bn.weight, layer1.bn.weight, "
        "layer2.bn.weight, layer3.bn.weight, and 2 more. Expected that of one batch norm, bn.state_dict(). "
        "Convert the model with jbn.tools.from_torch_state_dict(state_dict, mapping).",
    ),
    "from_keras of many entries": (
        lambda: jbn.tools.from_keras({f"w{number}": VECTOR for number in range(6)}),
        "jbn.tools.from_keras: state is a mapping with the unknown w0, w1, w2, w3, and 2 more and without "
        "moving_mean, moving_variance. Expected moving_mean, moving_variance, and perhaps gamma, beta. Pass "
        "{v.name: v.value for v in layer.weights} of one BatchNormalization without renorm.",
    ),
    "no mapping": (
        lambda: from_torch([VECTOR]),
        "jbn.tools.from_torch: state is a list of 1. Expected a mapping with weight, bias, "
        f"running_mean, running_var, num_batches_tracked. {BN}",
    ),
    "no statistics": (
        lambda: from_torch({"weight": VECTOR, "bias": VECTOR}),
        "jbn.tools.from_torch: state is a mapping without running_mean, running_var. Expected running_mean, "
        f"running_var, and perhaps weight, bias, num_batches_tracked. {BN}",
    ),
    "unknown and missing": (
        lambda: from_torch({"gamma": VECTOR, "beta": VECTOR, "running_mean": VECTOR}),
        "jbn.tools.from_torch: state is a mapping with the unknown gamma, beta and without running_var. Expected "
        f"running_mean, running_var, and perhaps weight, bias, num_batches_tracked. {BN}",
    ),
    "another size": (
        lambda: from_torch(STATE | {"bias": np.zeros(4, np.float32)}),
        "jbn.tools.from_torch: state['bias'] is float32[4]. Expected floats of shape (3,), one per channel. "
        + BN,
    ),
    "two axes": (
        lambda: from_torch(dict.fromkeys(STATE, np.zeros((1, 3), np.float32))),
        "jbn.tools.from_torch: state['weight'] is float32[1,3]. Expected floats of shape (3,), one per channel. "
        + BN,
    ),
    "integers": (
        lambda: from_torch(STATE | {"running_var": np.ones(3, np.int32)}),
        "jbn.tools.from_torch: state['running_var'] is int32[3]. Expected floats of shape (3,), one per channel. "
        + BN,
    ),
    "double precision": (
        lambda: from_torch(STATE | {"running_var": np.ones(3)}),
        "jbn.tools.from_torch: state['running_var'] is float64[3]. Expected a dtype that JAX keeps. Cast it to "
        "float32, or enable jax_enable_x64.",
    ),
    "a counter beyond int32": (
        lambda: from_torch(STATE | {"num_batches_tracked": np.array(2**31)}),
        "jbn.tools.from_torch: state['num_batches_tracked'] is int64[] of value 2147483648. Expected one integer "
        f"from 0 to 2147483647. {BN}",
    ),
    "a counter per channel": (
        lambda: to_torch(PARAMS, {**STATS, "count": jnp.zeros(3, jnp.int32)}),
        "jbn.tools.to_torch: batch_stats['count'] is int32[3]. Expected one integer from 0 to 2147483647. "
        + COLLECTIONS,
    ),
    "a bias alone, torch": (
        lambda: to_torch({"bias": PARAMS["bias"]}, STATS),
        "jbn.tools.to_torch: params is a bias without a scale. Expected a bias only beside a scale. Add a "
        "scale of ones, which changes nothing.",
    ),
    "params of a model": (
        lambda: to_torch({"BatchNorm_0": PARAMS}, STATS),
        "jbn.tools.to_torch: params is a mapping with the unknown BatchNorm_0. Expected perhaps scale, bias. "
        + COLLECTIONS,
    ),
    "params of another size": (
        lambda: to_torch(jbn.init(4)[0], STATS),
        "jbn.tools.to_torch: params['scale'] is float32[4]. Expected floats of shape (3,), one per channel. "
        + COLLECTIONS,
    ),
    "no batch_stats": (
        lambda: to_torch(PARAMS, None),
        f"jbn.tools.to_torch: batch_stats is None. Expected a mapping with mean, var, count. {COLLECTIONS}",
    ),
    "renorm": (
        lambda: from_keras({"moving_mean": VECTOR, "moving_variance": VECTOR, "renorm_mean": VECTOR}),
        "jbn.tools.from_keras: state is a mapping with the unknown renorm_mean. Expected moving_mean, moving_variance, "
        "and perhaps gamma, beta. Pass {v.name: v.value for v in layer.weights} of one BatchNormalization without "
        "renorm.",
    ),
    "a count for Keras": (
        lambda: to_keras(PARAMS, COUNTED),
        "jbn.tools.to_keras: batch_stats is a mapping with the unknown count. Expected mean, var. Pass the collections "
        "of one layer, without its count: Keras keeps none.",
    ),
    "half a moving average": (
        lambda: from_haiku({}, EMA, {"average": VECTOR}),
        "jbn.tools.from_haiku: var_ema is a mapping without hidden, counter. Expected hidden, average, counter. Pass "
        "params['batch_norm'], state['batch_norm/~/mean_ema'] and state['batch_norm/~/var_ema'].",
    ),
    "foreign Haiku parameters": (
        lambda: from_haiku({"w": VECTOR}, EMA, EMA),
        "jbn.tools.from_haiku: params is a mapping with the unknown w. Expected perhaps scale, offset. Pass "
        "params['batch_norm'], state['batch_norm/~/mean_ema'] and state['batch_norm/~/var_ema'].",
    ),
    "different counters": (
        lambda: from_haiku({}, EMA, EMA | {"counter": np.array(5)}),
        "jbn.tools.from_haiku: var_ema['counter'] is 5. Expected that of mean_ema, 4. Pass params['batch_norm'], "
        "state['batch_norm/~/mean_ema'] and state['batch_norm/~/var_ema'].",
    ),
    "several feature axes": (
        lambda: from_haiku({}, EMA | {"average": np.zeros((1, 2, 3), np.float32)}, EMA),
        "jbn.tools.from_haiku: mean_ema['average'] is float32[1,2,3]. Expected floats of shape (6,), one per channel. "
        "Pass params['batch_norm'], state['batch_norm/~/mean_ema'] and state['batch_norm/~/var_ema'].",
    ),
    "no count for Haiku": (
        lambda: to_haiku(PARAMS, STATS, decay_rate=0.9, ndim=2),
        "jbn.tools.to_haiku: batch_stats is a mapping without count. Expected mean, var, count. Pass one layer's, with "
        "the number of updates: {**batch_stats, 'count': jnp.int32(updates)}.",
    ),
    "a decay rate of 1": (
        lambda: to_haiku(PARAMS, COUNTED, decay_rate=1, ndim=2),
        "jbn.tools.to_haiku: decay_rate is 1. Expected a number from 0 up and below 1. Pass that of the layer.",
    ),
    "an axis that is none": (
        lambda: to_haiku(PARAMS, COUNTED, decay_rate=0.9, ndim=2, axis=2),
        "jbn.tools.to_haiku: axis is 2 with ndim=2. Expected an axis of the layer's inputs. For NHWC pass ndim=4 and "
        "axis=-1, for NCHW ndim=4 and axis=1.",
    ),
    "neither counter nor first_time": (
        lambda: from_equinox({"mean": VECTOR, "var": VECTOR}, momentum=0.9),
        "jbn.tools.from_equinox: state is a mapping without counter. Expected mean, var, counter, and perhaps weight, "
        f"bias. {TAKE}",
    ),
    "counter and first_time": (
        lambda: from_equinox(
            {"mean": VECTOR, "var": VECTOR, "counter": COUNTER, "first_time": False}, momentum=0.9
        ),
        "jbn.tools.from_equinox: state is a mapping with the unknown counter. Expected mean, var, first_time, and "
        f"perhaps weight, bias. {TAKE}",
    ),
    "before the first batch": (
        lambda: from_equinox({"mean": VECTOR, "var": VECTOR, "first_time": jnp.array(True)}, momentum=0.9),
        "jbn.tools.from_equinox: state['first_time'] is True. Expected a layer that has seen a batch. Before the first "
        "batch a layer in mode='ema' has no statistics: start from jbn.init.",
    ),
    "a momentum of None": (
        lambda: from_equinox({"mean": VECTOR, "var": VECTOR, "counter": COUNTER}, momentum=None),
        "jbn.tools.from_equinox: momentum is None. Expected a number from 0 up and below 1. Pass that of the layer.",
    ),
    "a scale alone, equinox": (
        lambda: to_equinox({"scale": PARAMS["scale"]}, STATS, momentum=0.9),
        "jbn.tools.to_equinox: params is a scale without a bias. Expected a scale only beside a bias. Add a "
        "bias of zeros, which changes nothing.",
    ),
    "an unknown library": (
        lambda: settings_from("tensorflow"),
        "jbn.tools.settings_from: library is 'tensorflow'. Expected torch, keras, haiku, equinox. Name one of these.",
    ),
    "settings without a counterpart": (
        lambda: settings_from("torch", num_features=3, eps=1e-5, track_running_stats=False),
        "jbn.tools.settings_from: theirs is a mapping with the unknown num_features, track_running_stats. Expected "
        f"perhaps momentum, eps, affine, bias. {LEAVE}",
    ),
    "settings that are missing": (
        lambda: settings_from("haiku", axis=[0, 1]),
        "jbn.tools.settings_from: theirs is a mapping with the unknown axis and without decay_rate, create_scale, "
        "create_offset. Expected decay_rate, create_scale, create_offset, and perhaps data_format, eps, "
        f"cross_replica_axis, cross_replica_axis_index_groups. {LEAVE}",
    ),
    "our settings without a counterpart": (
        lambda: settings_to("keras", axis_name="data", dtype=None),
        "jbn.tools.settings_to: ours is a mapping with the unknown axis_name, dtype. Expected perhaps axis, epsilon, "
        f"momentum, use_bias, use_scale. {LEAVE}",
    ),
    "a mode without a counterpart": (
        lambda: settings_from("equinox", axis_name="batch", mode="ema"),
        "jbn.tools.settings_from: mode is 'ema'. Expected 'batch'. Anything else has no counterpart.",
    ),
    "an axis that Haiku cannot name": (
        lambda: settings_to("haiku", axis=2),
        "jbn.tools.settings_to: axis is 2. Expected -1 or 1. Anything else has no counterpart.",
    ),
    "a rate above 1": (
        lambda: settings_from("torch", momentum=1.5),
        "jbn.tools.settings_from: momentum is 1.5. Expected a number from 0 to 1. Schedules have no counterpart, and "
        "None, the cumulative average, is for torch only.",
    ),
    "cumulative outside torch": (
        lambda: settings_to("keras", momentum=None),
        "jbn.tools.settings_to: momentum is None. Expected a number from 0 to 1. Schedules have no counterpart, and "
        "None, the cumulative average, is for torch only.",
    ),
    "a bias alone in the settings": (
        lambda: settings_to("torch", use_scale=False),
        "jbn.tools.settings_to: ours is a bias without a scale. Expected a bias only beside a scale. Add a "
        "scale of ones, which changes nothing.",
    ),
}
