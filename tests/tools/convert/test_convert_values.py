"""Values that conversions take: boxed arrays, and every name that Haiku has for an order of axes."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import jbn
from jbn.tools import settings_from, to_haiku, to_keras, to_torch, torch_state_dict
from tests.support.foreign import assert_same


def boxed(tree):
    return jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), tree)


def test_boxed_arrays_are_converted_as_their_values():
    params, batch_stats = jbn.init(3)
    given = params, {**batch_stats, "count": np.int32(4)}
    in_boxes = boxed(given[0]), boxed(given[1])
    assert_same(to_torch(*in_boxes), to_torch(*given))
    assert_same(to_keras(boxed(params), boxed(batch_stats)), to_keras(params, batch_stats))
    settings = {"decay_rate": 0.9, "ndim": 2}
    assert_same(to_haiku(*in_boxes, **settings), to_haiku(*given, **settings))


def test_boxed_models_are_converted_as_their_values():
    params, batch_stats = jbn.init(3)
    conv = {"kernel": np.ones((1, 1, 2, 3), np.float32)}
    variables = {"params": {"conv": conv, "bn": params}, "batch_stats": {"bn": batch_stats}}
    mapping = {"0": "conv", "1": "bn"}
    assert_same(torch_state_dict(boxed(variables), mapping), torch_state_dict(variables, mapping))


FORMATS = (
    "N...C",
    "NC...",
    "NHWC",
    "NCHW",
    "NWC",
    "NCDHW",
    "NC",
    "BTD",
    "TBD",
    "channels_last",
    "channels_first",
)


@pytest.mark.parametrize("data_format", FORMATS)
def test_every_data_format_of_haiku(data_format):
    hk = pytest.importorskip("haiku")
    given = {"decay_rate": 0.9, "create_scale": True, "create_offset": True, "data_format": data_format}
    assert settings_from("haiku", **given)["axis"] == hk.get_channel_index(data_format)
