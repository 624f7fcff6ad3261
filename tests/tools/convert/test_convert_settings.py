"""Settings of other libraries' layers, as ours and back."""

import inspect
import os

import numpy as np
import pytest

import jbn
import jbn.linen
from jbn.tools import settings_from, settings_to
from jbn.tools._convert.libraries import LIBRARIES
from tests.support.cases import assert_close
from tests.support.foreign import EVALUATION

KERAS = {"axis": -1, "momentum": 0.99, "epsilon": 1e-3, "scale": True, "center": True}
OURS = {"axis": -1, "momentum": 0.99, "epsilon": 1e-3, "use_scale": True, "use_bias": True}
SETTINGS = {
    "torch": (
        "torch",
        {"momentum": 0.1, "eps": 1e-5, "affine": True},
        {"momentum": 0.9, "epsilon": 1e-5, "use_scale": True, "use_bias": True},
    ),
    "torch, cumulative": (
        "torch",
        {"momentum": None, "eps": 1e-3, "affine": False},
        {"momentum": None, "epsilon": 1e-3, "use_scale": False, "use_bias": False},
    ),
    "torch, no bias": (
        "torch",
        {"momentum": 0.0, "eps": 0.0, "affine": True, "bias": False},
        {"momentum": 1.0, "epsilon": 0.0, "use_scale": True, "use_bias": False},
    ),
    "keras": (
        "keras",
        {"axis": 1, "momentum": 0.9, "epsilon": 1e-3, "scale": False, "center": True},
        {"axis": 1, "momentum": 0.9, "epsilon": 1e-3, "use_scale": False, "use_bias": True},
    ),
    "keras, renorm": (
        "keras",
        KERAS | {"renorm": True, "renorm_clipping": {"rmax": 3.0, "rmin": 0.25, "dmax": 5.0}},
        OURS | {"renorm": jbn.Renorm(3.0, 5.0, r_min=0.25)},
    ),
    "keras, renorm without limits": (
        "keras",
        KERAS | {"renorm": True, "renorm_clipping": {}},
        OURS | {"renorm": jbn.Renorm(np.inf, np.inf, r_min=0.0)},
    ),
    "keras, no renorm": (
        "keras",
        KERAS | {"renorm": False, "renorm_clipping": None},
        OURS | {"renorm": None},
    ),
    "haiku": (
        "haiku",
        {
            "data_format": "channels_first",
            "decay_rate": 0.9,
            "eps": 1e-4,
            "create_scale": True,
            "create_offset": False,
            "cross_replica_axis": "data",
            "cross_replica_axis_index_groups": [[0, 1], [2, 3]],
        },
        {
            "axis": 1,
            "momentum": 0.9,
            "epsilon": 1e-4,
            "use_scale": True,
            "use_bias": False,
            "axis_name": "data",
            "axis_index_groups": [[0, 1], [2, 3]],
        },
    ),
    "equinox": (
        "equinox",
        {"axis_name": "batch", "momentum": 0.9, "eps": 1e-4, "channelwise_affine": False, "mode": "batch"},
        {"axis_name": "batch", "momentum": 0.9, "epsilon": 1e-4, "use_scale": False, "use_bias": False},
    ),
}


@pytest.mark.parametrize(("library", "theirs", "ours"), SETTINGS.values(), ids=SETTINGS)
def test_settings_there_and_back(library, theirs, ours):
    assert settings_from(library, **theirs) == ours
    assert settings_to(library, **ours) == theirs


@pytest.mark.parametrize("axis", [[3], (3,), 3])
def test_axes_as_keras_stores_them(axis):
    """Keras 2 and `tf.layers` make a list of the axis."""
    assert settings_from("keras", axis=axis)["axis"] == 3


@pytest.mark.parametrize(("library", "theirs", "ours"), SETTINGS.values(), ids=SETTINGS)
def test_layers_take_the_settings(library, theirs, ours):
    fields = set(jbn.linen.BatchNorm.__dataclass_fields__)
    assert set(settings_from(library, **theirs)) <= fields


@pytest.mark.parametrize("rate", [0.1, 0.9, 0.01, 0.3, 0.003, 1e-9, 0.7, 1.0, 0, np.float32(0.1)])
def test_rates_come_back_as_they_were(rate):
    decay = settings_from("torch", momentum=rate)["momentum"]
    assert type(decay) is float
    assert settings_to("torch", momentum=decay)["momentum"] == float(str(rate))


def test_the_lower_limit_of_renorm_that_follows_the_upper_one():
    assert settings_to("keras", renorm=jbn.Renorm(4.0, 5.0))["renorm_clipping"] == {
        "rmax": 4.0,
        "rmin": 0.25,
        "dmax": 5.0,
    }
    assert settings_from("keras", renorm=True)["renorm"] == jbn.Renorm(np.inf, np.inf, r_min=0.0)
    assert settings_from("keras", renorm=False, renorm_clipping={"rmax": 2.0})["renorm"] is None


def layer_classes():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    return {
        "torch": lambda: pytest.importorskip("torch").nn.BatchNorm2d,
        "keras": lambda: pytest.importorskip("keras").layers.BatchNormalization,
        "haiku": lambda: pytest.importorskip("haiku").BatchNorm,
        "equinox": lambda: pytest.importorskip("equinox").nn.BatchNorm,
    }


@pytest.mark.parametrize("library", ["torch", "keras", "haiku", "equinox"])
def test_defaults_are_those_of_the_library(library):
    theirs = inspect.signature(layer_classes()[library]().__init__).parameters
    for name, (_, default) in LIBRARIES[library].settings.items():
        if (library, name) == ("torch", "bias") and name not in theirs:
            continue  # older versions
        expected = theirs[name].default
        if (library, name) == ("equinox", "mode"):
            assert (expected, default) == ("legacy", ...)  # which warns: the mode has to be said
        else:
            assert default == (... if expected is inspect.Parameter.empty else expected), name


def test_our_defaults_are_those_of_the_layer():
    fields = jbn.linen.BatchNorm.__dataclass_fields__
    for library, required in (("torch", {}), ("keras", {}), ("haiku", {}), ("equinox", {"axis_name": "b"})):
        for name, value in settings_from(library, **settings_to(library, **required)).items():
            assert value == required.get(name, fields[name].default), name


def test_a_copied_rate_would_be_wrong():
    """Five batches of variance 1.25, from 1: 1.1024 with decay 0.9; 1.25 if PyTorch's 0.1 were the decay."""
    x = np.tile(np.float32([0, 1, 2, 3]), 1000)[:, None]
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm1d(1, momentum=0.1)
    right, copied = jbn.init(1)[1], jbn.init(1)[1]
    for _ in range(5):
        layer(torch.from_numpy(x))
        right, copied = (
            jbn.batch_norm({}, stats, x, use_running_average=False, momentum=momentum)[1]
            for stats, momentum in ((right, settings_from("torch", momentum=0.1)["momentum"]), (copied, 0.1))
        )
    assert_close(right["var"], np.float32([1.10238]), 1e-5)
    assert_close(right["mean"], layer.running_mean.numpy(), EVALUATION)
    assert_close(right["var"], layer.running_var.numpy(), 2e-4)  # theirs is unbiased: 4000 / 3999
    assert_close(copied["var"], np.float32([1.25]), 1e-4)
