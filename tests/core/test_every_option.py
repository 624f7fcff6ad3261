"""All options at once, at random: the right answer, or an error of ours; anything else is a fault.

What is drawn is in `drawing.py`, the right answer in `naive.py`.
"""

import functools
import os
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import naive, reference
from tests.support.cases import assert_close, loosely, tolerance
from tests.support.doors import DOORS
from tests.support.random_calls import WRONG, arrays, batch_axis, calls

EXAMPLES = int(os.environ.get("JBN_EXAMPLES", "40"))
ENOUGH, SECONDS = 10, 20  # of the 40 calls so many at least, and no further ones after so much CPU time


def test_the_right_answer_or_an_error_of_ours():
    """The same calls on every run, the first of them, as many as the time allows; half have an answer.

    With more than 40 they are others each time, and all are made.
    """
    longer = EXAMPLES > 40
    seeds = random.sample(range(2**32), EXAMPLES) if longer else range(EXAMPLES)
    start, answered = time.process_time(), []
    for seed in seeds:
        if not longer and len(answered) >= ENOUGH and time.process_time() - start > SECONDS:
            break
        call = calls(seed)
        try:
            answered.append(has_the_right_answer(call))
        except BaseException as error:
            error.add_note(f"calls({seed}) is {call}")
            raise
    assert 2 * sum(answered) >= len(answered), f"{sum(answered)} of {len(answered)}"


@pytest.mark.parametrize("wrong", WRONG, ids=[f"{name} {i}" for i, (name, _) in enumerate(WRONG)])
def test_what_no_call_may_have(wrong):
    for seed in range(16):
        call = calls(seed) | {"wrong": wrong}
        if wrong[0] != "dtype" or call["door"] == "core":
            assert not has_the_right_answer(call)


def has_the_right_answer(call):
    """Whether the call has an answer, and then the right one; it may have an error of ours instead."""
    given = arrays(call)
    try:
        y, new, gradients = ours(call, given)
    except ValueError as error:
        assert str(error).startswith("jbn."), error  # noqa: PT017 - which one, error_texts says
        return False
    assert not call["wrong"], f"no error of {call['wrong']}"
    assert y.dtype == y_dtype(call)
    expected, new_expected, gradients_expected = theirs(call, given, y.dtype)
    tol = 4 * tolerance(y.dtype)
    assert_same(y, expected, tol, where=None if given.weights is None else given.weights > 0)
    assert_statistics(new, new_expected, call["parts"])
    if jnp.finfo(y.dtype).bits == 32 and call["x"] not in (jnp.bfloat16, np.float16):
        # in low precision relu may decide otherwise where y is about 0
        assert jax.tree.structure(gradients) == jax.tree.structure(gradients_expected)
        good = ~spoilt(given, call["axis"])
        for one, other in zip(*map(jax.tree.leaves, (gradients, gradients_expected)), strict=True):
            where = np.broadcast_to(
                good if other.ndim == good.ndim else good.reshape(other.shape), other.shape
            )
            assert_same(one, other, 10 * tol, where)
    return True


def assert_statistics(new, expected, parts):
    """The same on every device."""
    assert (new is None) == (expected is None)
    for name in new or ():
        one = np.asarray(new[name] if parts is None else new[name][0])
        np.testing.assert_array_equal(new[name], np.broadcast_to(one, new[name].shape))
        assert_same(one, expected[name], 4 * tolerance(np.float32))


def assert_same(actual, expected, tol, where=None):
    """NaN or inf in the same places, and close in all others."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    finite, where = np.isfinite(expected), np.ones(expected.shape, bool) if where is None else where
    np.testing.assert_array_equal(np.isfinite(actual)[where], finite[where])
    kept = where & finite
    assert_close(*(np.where(kept, values, np.zeros_like(values)) for values in (actual, expected)), tol)


def spoilt(given, axis):
    """The channels with NaN or inf in a row that takes part, which have no gradient; other axes are 1."""
    used = True if given.weights is None else given.weights > 0
    return np.any(used & ~np.isfinite(given.x), reference.reduced_axes(given.x, axis), keepdims=True)


def y_dtype(call):
    """As asked, else x's; the layers take their parameters into account, as Flax does."""
    if call["dtype"] is not None:
        return call["dtype"]
    alone = call["door"] == "core" or (call["door"] == "linen" and not call["params"])
    if alone and jnp.issubdtype(call["x"], jnp.inexact):
        return call["x"]
    return np.complex64 if call["x"] == np.complex64 else np.float32


def ours(call, given):
    """y, the new statistics and the gradients: by the door, in the mode and in the parts of the call."""
    wrong = dict([call["wrong"]] if call["wrong"] else [])
    flag = wrong.pop("use_running_average", call["mode"].endswith("evaluate"))
    chosen = call["options"] | {"axis": call["axis"], "dtype": call["dtype"]}
    if call["parts"]:
        chosen["axis_name"] = "data"

    def run(flag, traced):
        def normalize(params, x, residual, mask):
            extra = {name: a for name, a in (("mask", mask), ("residual", residual)) if a is not None}
            every = chosen | traced | extra | wrong
            return DOORS[call["door"]](params, given.batch_stats, x, flag, **every)

        def of(primals):
            every = given._asdict() | primals
            return in_parts(normalize, call, *(every[name] for name in ("params", "x", "residual", "mask")))

        y, pullback, new = jax.vjp(of, differentiable(given), has_aux=True)
        return y, new, pullback(jnp.asarray(cotangent(call, y.dtype)))[0]

    traced = {}
    if call["momentum is an array"] and chosen["momentum"] is not None:
        traced["momentum"] = jnp.asarray(chosen["momentum"], np.float32)
    if call["mode"].startswith("traced"):
        return jax.jit(run)(flag, traced)
    run = functools.partial(run, flag)
    return (jax.jit(run) if call["parts"] else run)(traced)  # a vmap by itself compiles every operation


def in_parts(normalize, call, *arguments):
    """`normalize` under vmap with an axis name, of the batch cut in parts; statistics come out by part."""
    parts, shape = call["parts"], call["shape"]
    if parts is None:
        return normalize(*arguments)
    batch = batch_axis(shape, call["axis"])

    def place(array):
        """Where the examples are; None in what all parts share."""
        if array.shape == (shape[batch],):
            return 0
        return batch if array.ndim == len(shape) and array.shape[batch] == shape[batch] else None

    def cut(array):
        array, axis = jnp.asarray(array), place(array)
        if axis is None:
            return array
        return array.reshape(*array.shape[:axis], parts, -1, *array.shape[axis + 1 :])

    places, pieces = (jax.tree.map(function, arguments) for function in (place, cut))
    y, new = jax.vmap(normalize, places, (batch, 0), axis_name="data")(*pieces)
    return y.reshape(shape), new


def theirs(call, given, dtype):
    """The same of the whole batch, in float64 and complex128."""
    if given.weights is not None:
        settled = np.where((given.weights > 0) | np.isfinite(given.x), given.x, np.zeros_like(given.x))
        given = given._replace(x=settled)

    def run(primals):
        every = wide(given._asdict()) | primals
        return naive.batch_norm(
            every["params"],
            every["batch_stats"],
            every["x"],
            every["residual"],
            axis=call["axis"],
            weights=given.weights,
            epsilon=call["options"]["epsilon"],
            options=call["options"],
            evaluating=call["mode"].endswith("evaluate"),
        )

    @jax.jit
    def all_of_it(primals, along):
        y, pullback, new = jax.vjp(run, primals, has_aux=True)
        return y, new, pullback(along if jnp.iscomplexobj(y) else along.real)[0]

    with jax.enable_x64(True), loosely():
        y, new, gradients = all_of_it(wide(differentiable(given)), wide(cotangent(call, dtype)))
    return np.asarray(y, np.complex128 if np.dtype(dtype).kind == "c" else np.float64), new, gradients


def wide(tree):
    def leaf(array):
        return np.asarray(array, np.complex128 if np.iscomplexobj(array) else np.float64)

    return jax.tree.map(leaf, tree)


def differentiable(given):
    """The arguments that have a derivative: integers have none."""
    every = {"params": given.params, "x": given.x, "residual": given.residual}
    return {
        name: value
        for name, value in every.items()
        if all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(value))
    }


def cotangent(call, dtype):
    real, imaginary = np.random.default_rng(7).standard_normal((2, *call["shape"]))
    return (real + 1j * imaginary if jnp.issubdtype(dtype, jnp.complexfloating) else real).astype(dtype)
