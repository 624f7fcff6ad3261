"""y and the new statistics, in training and in evaluation, against float64."""

import jax
import numpy as np
import pytest

import jbn
from tests.support import reference
from tests.support.cases import CASES, assert_close, by_name, tolerance


@pytest.mark.parametrize(**by_name(CASES))
def test_training_normalizes_by_the_batch(case):
    x, params, batch_stats = case.make_x(), case.make_params(), case.make_batch_stats()
    step = jax.jit(lambda p, s, x: jbn.batch_norm(p, s, x, use_running_average=False, **case.settings))
    y, new = step(params, batch_stats, x)
    assert y.dtype == case.dtype
    expected = reference.normalize(
        x, case.axis, params.get("scale"), params.get("bias"), case.epsilon, case.make_mask()
    )
    assert_close(y, expected, tolerance(case.dtype), where=case.weights() > 0)
    stats = reference.statistics(x, case.axis, case.make_mask())
    for name in ("mean", "var"):
        batch = getattr(stats, name).reshape(case.features)
        assert new[name].dtype == batch_stats[name].dtype
        assert_close(
            new[name], reference.running(batch_stats[name], batch, case.momentum), tolerance(np.float32)
        )


@pytest.mark.parametrize(**by_name(CASES))
def test_evaluation_normalizes_by_running_statistics_and_keeps_them(case):
    x, params, batch_stats = case.make_x(), case.make_params(), case.make_batch_stats()
    step = jax.jit(lambda p, s, x: jbn.batch_norm(p, s, x, use_running_average=True, **case.settings))
    y, new = step(params, batch_stats, x)
    assert y.dtype == case.dtype
    axes = reference.reduced_axes(x, case.axis)
    mean, var = (np.expand_dims(batch_stats[name], axes) for name in ("mean", "var"))
    expected = reference.apply(
        x, case.axis, mean, var, params.get("scale"), params.get("bias"), case.epsilon, case.make_mask()
    )
    assert_close(y, expected, tolerance(case.dtype), where=case.weights() > 0)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(new[name], batch_stats[name])


@pytest.mark.parametrize(**by_name(CASES))
def test_moments_are_those_of_the_batch(case):
    x = case.make_x()
    count, mean, var = reference.statistics(x, case.axis, case.make_mask())
    found = jbn.moments(x, axis=case.axis, mask=case.make_mask())
    assert_close(found.count, np.broadcast_to(count, var.shape).reshape(case.features), tolerance(np.float32))
    assert_close(found.mean, mean.reshape(case.features), tolerance(np.float32))
    assert_close(found.var, var.reshape(case.features), tolerance(np.float32))
