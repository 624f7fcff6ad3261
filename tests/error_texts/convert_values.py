"""Values of a wrong kind given to the conversions, and the whole text of each error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn.tools import (
    from_equinox,
    from_torch,
    from_torch_state_dict,
    settings_from,
    settings_to,
    to_haiku,
    to_torch,
    torch_state_dict,
)

VECTOR = np.zeros(3, np.float32)
PARAMS, STATS = jbn.init(3)
COUNTED = {**STATS, "count": jnp.int32(4)}
STATE = {"weight": VECTOR, "bias": VECTOR, "running_mean": VECTOR, "running_var": VECTOR}
EMA = {"mean": VECTOR, "var": VECTOR}
KERNEL = np.zeros((3, 2, 5, 5), np.float32)
TAKE = "The docstring of from_equinox shows how to take them out of a layer and its State."
READ = "Expected an array that can be read. Call it outside of jit, and not on tensors without data."
LIBRARIES = "Expected torch, keras, haiku, equinox. Name one of these."
NONE_ELSE = "Anything else has no counterpart."
RATE = "Expected a number from 0 to 1. Schedules have no counterpart, and None, the cumulative average, is for torch only."
EPSILON = "Expected a number from 0 up. The usual one is 1e-5."
FLAG = "Expected True or False. Pass that of the layer."
AXIS = "Expected an integer. Pass that of the layer."
FORMATS = "Expected 'channels_last' or 'channels_first', or letters such as 'NHWC' or 'NC...'. " + NONE_ELSE
KINDS = "Expected the arrays of a Conv, Dense or batch norm. Convert other kinds by hand, and leave them out of both sides."
HAIKU = {"decay_rate": 0.9, "create_scale": True, "create_offset": True}


def meta_tensor():
    torch = pytest.importorskip("torch")
    return from_torch(STATE | {"weight": torch.zeros(3, device="meta")})


TEXTS = {
    "no state of Equinox": (
        lambda: from_equinox(None, momentum=0.9),
        f"jbn.tools.from_equinox: state is None. Expected a mapping with weight, bias, mean, var, counter. {TAKE}",
    ),
    "a number as a state of Equinox": (
        lambda: from_equinox(3, momentum=0.9),
        f"jbn.tools.from_equinox: state is 3. Expected a mapping with weight, bias, mean, var, counter. {TAKE}",
    ),
    "first_time per channel": (
        lambda: from_equinox(EMA | {"first_time": np.zeros(2, bool)}, momentum=0.9),
        f"jbn.tools.from_equinox: state['first_time'] is bool[2]. Expected one bool. {TAKE}",
    ),
    "a list of libraries": (
        lambda: settings_from(["torch"]),
        f"jbn.tools.settings_from: library is ['torch']. {LIBRARIES}",
    ),
    "a rate of True": (
        lambda: settings_from("torch", momentum=True),
        f"jbn.tools.settings_from: momentum is True. {RATE}",
    ),
    **{
        f"{library} eps {value!r}": (
            functools.partial(settings_from, library, **{name: value}),
            f"jbn.tools.settings_from: {name} is {value!r}. {EPSILON}",
        )
        for library, name, value in (
            ("torch", "eps", "a"),
            ("torch", "eps", -1),
            ("torch", "eps", True),
            ("keras", "epsilon", float("nan")),
            ("keras", "epsilon", None),
        )
    },
    "affine 3": (
        lambda: settings_from("torch", affine=3),
        f"jbn.tools.settings_from: affine is 3. {FLAG}",
    ),
    "center None": (
        lambda: settings_from("keras", center=None),
        f"jbn.tools.settings_from: center is None. {FLAG}",
    ),
    "an axis of text": (
        lambda: settings_from("keras", axis="a"),
        f"jbn.tools.settings_from: axis is 'a'. {AXIS}",
    ),
    "renorm of text": (
        lambda: settings_from("keras", renorm="yes"),
        f"jbn.tools.settings_from: renorm is 'yes'. {FLAG}",
    ),
    **{
        f"renorm_clipping {value!r}": (
            functools.partial(settings_from, "keras", renorm=True, renorm_clipping=value),
            f"jbn.tools.settings_from: renorm_clipping is {value!r}. Expected a mapping with perhaps rmax from "
            "1 up, rmin from 0 to 1, dmax from 0 up. Pass that of the layer.",
        )
        for value in (3, {"r_max": 3.0}, {"rmax": 0.5}, {"rmin": 2.0}, {"dmax": "5"})
    },
    "renorm for torch": (
        lambda: settings_from("torch", renorm=True),
        "jbn.tools.settings_from: theirs is a mapping with the unknown renorm. Expected perhaps momentum, eps, "
        "affine, bias. Leave out what has no counterpart, once you know that nothing is lost with it.",
    ),
    "our renorm": (
        lambda: settings_to("keras", renorm=(3.0, 5.0)),
        "jbn.tools.settings_to: renorm is (3.0, 5.0). Expected None or jbn.Renorm with numbers. Values of a "
        "schedule are not kept by the layer: pass the last of them.",
    ),
    "our epsilon": (
        lambda: settings_to("torch", epsilon=-1.0),
        f"jbn.tools.settings_to: epsilon is -1.0. {EPSILON}",
    ),
    "our use_scale": (
        lambda: settings_to("keras", use_scale="yes"),
        f"jbn.tools.settings_to: use_scale is 'yes'. {FLAG}",
    ),
    "several axes for Keras": (
        lambda: settings_to("keras", axis=(1, 2)),
        f"jbn.tools.settings_to: axis is (1, 2). {AXIS}",
    ),
    "a list of formats": (
        lambda: settings_from("haiku", **HAIKU, data_format=["a"]),
        f"jbn.tools.settings_from: data_format is ['a']. {FORMATS}",
    ),
    "a format without channels": (
        lambda: settings_from("haiku", **HAIKU, data_format="NHW"),
        f"jbn.tools.settings_from: data_format is 'NHW'. {FORMATS}",
    ),
    "ndim of text": (
        lambda: to_haiku(PARAMS, COUNTED, decay_rate=0.9, ndim="a"),
        "jbn.tools.to_haiku: axis is -1 with ndim='a'. Expected an axis of the layer's inputs. For NHWC pass "
        "ndim=4 and axis=-1, for NCHW ndim=4 and axis=1.",
    ),
    "several axes for Haiku": (
        lambda: to_haiku(PARAMS, COUNTED, decay_rate=0.9, ndim=4, axis=(1, 2)),
        "jbn.tools.to_haiku: axis is (1, 2) with ndim=4. Expected an axis of the layer's inputs. For NHWC pass "
        "ndim=4 and axis=-1, for NCHW ndim=4 and axis=1.",
    ),
    "inside of jit": (
        lambda: jax.jit(lambda params: to_torch(params, STATS))(PARAMS),
        f"jbn.tools.to_torch: params['scale'] is float32[3]. {READ}",
    ),
    "tensors without data": (
        meta_tensor,
        f"jbn.tools.from_torch: state['weight'] is torch.float32[3]. {READ}",
    ),
    "ragged lists": (
        lambda: from_torch(STATE | {"bias": [[1.0], [1.0, 2.0]]}),
        f"jbn.tools.from_torch: state['bias'] is a list of 2. {READ}",
    ),
    "names that are numbers": (
        lambda: from_torch_state_dict({0: VECTOR}, {"fc": "Dense_0"}),
        "jbn.tools.from_torch_state_dict: state_dict is one with 0. Expected names of arrays such as 'fc.weight'. "
        "Pass model.state_dict().",
    ),
    "a list of arrays": (
        lambda: from_torch_state_dict([VECTOR, VECTOR], {"fc": "Dense_0"}),
        "jbn.tools.from_torch_state_dict: state_dict is a list of 2. Expected a mapping of names to arrays. "
        "Pass model.state_dict().",
    ),
    "a list as a mapping": (
        lambda: torch_state_dict({}, [VECTOR]),
        "jbn.tools.torch_state_dict: mapping is a list of 1. Expected a mapping of PyTorch modules to Flax modules. "
        "For example {'conv': 'Conv_0', 'bn': 'BatchNorm_0'}.",
    ),
    "a path that is a number": (
        lambda: from_torch_state_dict({"fc.weight": VECTOR}, {"fc": 3}),
        "jbn.tools.from_torch_state_dict: mapping is one with 'fc': 3. Expected a mapping of PyTorch modules to Flax "
        "modules. For example {'conv': 'Conv_0', 'bn': 'BatchNorm_0'}.",
    ),
    "a module that is a number": (
        lambda: torch_state_dict({"params": {"Dense_0": {"kernel": VECTOR}}}, {3: "Dense_0"}),
        "jbn.tools.torch_state_dict: mapping is one with 3: 'Dense_0'. Expected a mapping of PyTorch modules to Flax "
        "modules. For example {'conv': 'Conv_0', 'bn': 'BatchNorm_0'}.",
    ),
    **{
        f"a path inside of {name}": (
            functools.partial(
                from_torch_state_dict,
                {"a.weight": KERNEL, "a.bias": VECTOR, "b.weight": KERNEL},
                {"a": "Conv_0", "b": f"Conv_0/{name}"},
            ),
            f"jbn.tools.from_torch_state_dict: mapping is one with Conv_0/{name}. Expected paths of modules, and none "
            "inside of an array. Each module has a path of its own.",
        )
        for name in ("kernel", "bias", "kernel/deeper")
    },
    "a bias of another length": (
        lambda: from_torch_state_dict(
            {"a.weight": KERNEL, "a.bias": np.zeros(2, np.float32)}, {"a": "Conv_0"}
        ),
        "jbn.tools.from_torch_state_dict module 'a': state_dict is weight float32[3,2,5,5], bias float32[2]. "
        + KINDS,
    ),
    "DenseGeneral": (
        lambda: torch_state_dict(
            {"params": {"general": {"kernel": np.zeros((6, 4, 2), "f"), "bias": np.zeros((4, 2), "f")}}},
            {"0": "general"},
        ),
        "jbn.tools.torch_state_dict module '0': params is bias float32[4,2], kernel float32[6,4,2]. " + KINDS,
    ),
    "a module of another kind": (
        lambda: torch_state_dict({"params": {"scale": VECTOR}}, {"": ()}),
        "jbn.tools.torch_state_dict module '': params is scale float32[3]. " + KINDS,
    ),
    "a model that is mapped in vain": (
        lambda: torch_state_dict({"params": {}}, {"fc": ()}),
        "jbn.tools.torch_state_dict: variables is one with nothing of the mapped 'the model itself'. Expected exactly "
        "what mapping names. Map each module that has arrays, and no other; take out what you convert by hand.",
    ),
}
