"""Which channels the report counts as dead or not finite, which layers as new, and what their ranges are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.tools import report
from tests.support.report_models import HEALTHY, array, moments_of, only, variables_of

DEAD = {
    "scale 0": (array(1.0, 1.0), array(1.0, 1.0), array(1.0, 0.0)),
    "tiny scale": (array(1.0, 1.0), array(1.0, 1.0), array(50.0, -4e-5)),
    "variance 0": (array(1.0, 0.0), array(1.0, 0.0), array(1.0, 1.0)),
    "tiny beside epsilon": (array(1.0, 0.0), array(1.0, 1e-18), array(1.0, 1.0)),
    "tiny beside the mean": (array(1.0, 1e5), array(1.0, 9e-3), array(1.0, 1.0)),
    "no scale, variance 0": (array(1.0, 0.0), array(1.0, 0.0)),
}


@pytest.mark.parametrize("layer", DEAD.values(), ids=DEAD)
def test_dead_channels_are_found(layer):
    found = report(variables_of(bn=layer))
    assert found.channels[0].dead.tolist() == [False, True]
    assert only(found).dead == 1


def test_small_channels_are_not_dead():
    layer = array(1.0, 1.0, 0.0, 1e4), array(1.0, 1.0, 1e-15, 1.0), array(10.0, 1e-4, 1.0, 1.0)
    assert only(report(variables_of(bn=layer))).dead == 0


def test_a_channel_is_dead_where_the_batch_is_constant():
    """Long before the running variance has come down to 0; and alive where the batch varies again."""
    variables = variables_of(bn=(array(3.0, 3.0, 3.0), array(1.0, 1.0, 0.0)))
    batch = moments_of(array(3.0, 3.0, 3.0), array(1.0, 0.0, 1.0))
    assert report(variables, {"bn": batch}).channels[0].dead.tolist() == [False, True, False]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["mean", "var", "scale", "bias", "batch mean", "batch var", "batch count"])
def test_nonfinite_channels_are_counted_and_left_out(where, value):
    variables = variables_of(bn=(array(1.0, 2.0, 3.0), array(1.0, 2.0, 3.0), array(1.0, 2.0, 3.0)))
    variables["params"]["bn"]["bias"] = array(0.0, 0.0, 0.0)
    batch = moments_of(array(0.0, 0.0, 0.0), array(1.0, 1.0, 1.0))
    parts = {**variables["params"]["bn"], **variables["batch_stats"]["bn"]}
    parts |= {f"batch {name}": part for name, part in vars(batch).items()}
    two = jax.tree.map(lambda part: part[[0, 2]], (variables, {"bn": batch}))
    parts[where][1] = value
    found, without = report(variables, {"bn": batch}), report(*two)
    assert found.channels[0].nonfinite.tolist() == [False, True, False]
    for name in (
        "drift",
        "mean_drift_max",
        "mean_drift_median",
        "var_drift_max",
        "var_drift_median",
        "var_max",
    ):
        assert getattr(only(found), name) == getattr(only(without), name)
    assert only(found).nonfinite == 1
    assert only(found).dead == 0
    assert found.notes[0] == "1 of 1 layer has NaN or inf: bn. Go back to statistics that are finite."


def test_a_negative_variance_counts_as_not_finite():
    assert only(report(variables_of(bn=(array(0.0, 1.0), array(-1.0, 2.0))))).nonfinite == 1


def test_updates_and_layers_that_were_never_updated():
    variables = variables_of(new=(array(0.0, 0.0), array(1.0, 1.0)), old=HEALTHY, other=HEALTHY)
    variables["batch_stats"]["old"] |= {"count": np.int32(7), "rows": array(56.0, 56.0)}
    variables["batch_stats"]["other"]["count"] = np.array([3, 0], np.int32)
    found = report(variables)
    assert [row.updates for row in found.rows] == [None, 7, 0]
    assert [row.never_updated for row in found.rows] == [True, False, True]
    assert found.notes == (
        "2 of 3 layers were never updated: new, other. Keep the batch_stats that training returns.",
    )


def test_complex_means_count_by_absolute_value():
    layer = array(3 + 4j, -1j, dtype=np.complex64), array(1.0, 1.0)
    row = only(
        report(variables_of(bn=layer), {"bn": moments_of(array(0j, 0j, dtype=np.complex64), layer[1])})
    )
    assert (row.mean_min, row.mean_max) == (1.0, 5.0)
    assert row.mean_drift_max == pytest.approx(5.0, rel=1e-5)


def test_bfloat16_and_partitioned_parameters():
    scale = nn.Partitioned(jnp.array([1.5, -0.25], jnp.bfloat16), names=("c",))
    row = only(report(variables_of(bn=(*HEALTHY[:2], scale))))
    assert (row.scale_min, row.scale_max) == (0.25, 1.5)
