"""Models on which a careless proof of folding would accept what is wrong, or refuse what is right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.tools import fold_variables
from jbn.tools._fold.proof import random_like
from tests.support.cases import assert_close, assert_trees_close
from tests.support.fold_models import TOLERANCE, net, norm, random

pytestmark = pytest.mark.usefixtures("flax_promotion")

PAIR = "Dense_0 -> BatchNorm_0"
MOVED_FIX = (
    "Leave the pair out: something else uses the layer's output too, or stands between it and the batch "
    "norm, or its epsilon is another, or the new values do not fit their dtype."
)
UNSEEN_FIX = (
    "A later scale of 0, outputs that are constant, or far larger than what the batch norm adds, hide the "
    "pair: pass another x or call, or values as after training, or leave the pair out."
)


def used_raw_too(x):
    y = nn.Dense(3)(x)
    return norm()(y) + y


def stem_and_block(x):
    """As the stem of a pre-activation ResNet: the batch norm and the shortcut both take its output."""
    y = nn.Dense(3, name="stem")(x)
    branch = nn.Dense(3, name="inner")(nn.relu(norm(name="first")(y)))
    return y + norm(name="second")(branch)


def never_above_zero(x):
    return nn.relu(norm()(nn.relu(nn.Dense(3)(x))) - 100.0)


def zero_branch(between):
    """A residual block as it starts: the last scale is 0."""

    def run(x):
        y = norm(name="bn1")(between(nn.Dense(3, name="d1")(x)))
        return x + norm(name="bn2")(nn.Dense(3, name="d2")(nn.relu(y)))

    model, variables, x = net(run)
    variables["params"]["bn2"]["scale"] = jnp.zeros(3)
    return model, variables, x


def error_of(*args, **settings):
    with pytest.raises(ValueError, match=r"fold_variables") as caught:
        fold_variables(*args, **settings)
    return str(caught.value)


def test_a_wrong_pair_is_seen_from_an_input_of_constant_integers(capsys):
    def run(x):
        return used_raw_too(x / np.float32(255))

    model, variables, _ = net(run, random(4, 3))
    x = np.zeros((4, 3), np.uint8)
    folded = fold_variables(variables, call=model.apply, x=x)
    out = capsys.readouterr().out
    assert out.startswith(f"{PAIR}\nnot folded: {PAIR}, which moves outputs by ")
    assert_trees_close(folded, variables, 0.0)
    text = error_of(variables, [("Dense_0", "BatchNorm_0")], call=model.apply, x=x)
    assert text.startswith(
        f"jbn.tools.fold_variables: pairs is a sequence with {PAIR}, which moves outputs by "
    )
    assert text.endswith(f" of the largest. Expected at most 1.0e-05. {MOVED_FIX}")


def test_random_integers_stay_in_the_range_of_the_example():
    """An id out of range gives NaN, or that of another; a constant says nothing about the range."""
    ids = np.array([3] * 50 + [7] * 50)
    made = random_like(
        {
            "ids": ids,
            "negative": -ids.astype(np.int16),
            "image": np.zeros(1000, np.uint8),
            "signed image": jnp.zeros(1000, jnp.int8),
            "zeros": np.zeros(100, np.int32),
            "sevens": jnp.full(100, 7),
            "mask": np.ones(100, bool),
            "shape": jax.ShapeDtypeStruct((100,), np.int32),
            "step": np.int32(7),
            "train": np.bool_(False),
            "none": np.zeros((0, 3), np.int32),
            "key": jax.random.key(0),
        }
    )
    ranges = {
        "ids": (3, 7),
        "negative": (-7, -3),
        "image": (0, 255),
        "signed image": (-128, 127),
        "zeros": (0, 1),
        "sevens": (0, 7),
        "mask": (0, 1),
        "shape": (0, 1),
        "step": (7, 7),
        "train": (0, 0),
    }
    assert {name: (int(made[name].min()), int(made[name].max())) for name in ranges} == ranges
    assert made["ids"].dtype == ids.dtype
    assert made["negative"].dtype == np.int16
    assert made["mask"].dtype == made["train"].dtype == bool
    assert made["none"].shape == (0, 3)
    assert made["key"].dtype == jax.random.key(0).dtype


def test_random_numbers_are_standard_normal():
    """And real and imaginary parts independent. Of 10^4 values a covariance is off by 0.01 to 0.014."""
    real, both = random_like([np.zeros(10_000, np.float32), np.zeros(10_000, np.complex64)])
    np.testing.assert_allclose(np.cov([real, both.real, both.imag]), np.eye(3), atol=0.05)


def test_outputs_that_do_not_show_a_pair_prove_nothing(capsys):
    model, variables, x = net(never_above_zero)
    assert error_of(variables, [("Dense_0", "BatchNorm_0")], call=model.apply, x=x) == (
        f"jbn.tools.fold_variables: pairs is a sequence with {PAIR}, which the outputs of call do not show. "
        f"Expected pairs whose batch norm moves an output by more than 1.0e-05 of the largest. {UNSEEN_FIX}"
    )
    hidden = net(lambda x: nn.relu(norm()(nn.Dense(3)(x)) - 100.0))
    folded = fold_variables(hidden[1], call=hidden[0].apply, x=x)
    assert capsys.readouterr().out == f"{PAIR}\nnot folded: {PAIR}, which the outputs of call do not show\n"
    assert_trees_close(folded, hidden[1], 0.0)


def test_a_branch_of_scale_zero_hides_what_is_before_it(capsys):
    model, variables, x = zero_branch(nn.relu)
    text = error_of(variables, [("d1", "bn1"), ("d2", "bn2")], call=model.apply, x=x)
    assert "with d1 -> bn1, which the outputs of call do not show" in text
    model, variables, x = zero_branch(lambda y: y)
    folded = fold_variables(variables, call=model.apply, x=x)
    lines = ["d1 -> bn1", "d2 -> bn2", "not folded: d1 -> bn1, which the outputs of call do not show"]
    assert capsys.readouterr().out.splitlines() == lines
    assert_close(model.apply(folded, x), model.apply(variables, x), TOLERANCE)
    assert_trees_close(folded["params"]["bn1"], variables["params"]["bn1"], 0.0)


def test_a_found_pair_that_does_harm_is_left_out_and_the_rest_is_folded(capsys):
    model, variables, x = net(stem_and_block)
    folded = fold_variables(variables, call=model.apply, x=x)
    first, second, last = capsys.readouterr().out.splitlines()
    assert [first, second] == ["stem -> first", "inner -> second"]
    assert last.startswith("not folded: stem -> first, which moves outputs by ")
    assert last.endswith(" of the largest")
    assert_close(model.apply(folded, x), model.apply(variables, x), TOLERANCE)
    for name in ("stem", "first"):
        assert_trees_close(folded["params"][name], variables["params"][name], 0.0)
    np.testing.assert_array_equal(folded["batch_stats"]["second"]["var"], 1.0)
    assert "with stem -> first, which moves" in error_of(
        variables, [("stem", "first"), ("inner", "second")], call=model.apply, x=x
    )


NOT_FINITE = {
    "minus infinity": lambda y: jnp.where(jnp.arange(3) > 0, y, -jnp.inf),
    "NaN": lambda y: jnp.where(jnp.arange(3) > 0, y, jnp.nan),
    "a logarithm": jnp.log,
}


@pytest.mark.parametrize("after", NOT_FINITE.values(), ids=NOT_FINITE)
def test_outputs_that_are_not_finite_in_places(after):
    model, variables, x = net(lambda x: after(norm()(nn.Dense(3)(x))))
    folded = fold_variables(variables, call=model.apply, x=x)
    assert_trees_close(folded["batch_stats"]["BatchNorm_0"]["var"], np.ones(3, np.float32), 0.0)
    model, variables, x = net(lambda x: after(used_raw_too(x)))
    assert f"{PAIR}, which moves outputs by " in error_of(
        variables, [("Dense_0", "BatchNorm_0")], call=model.apply, x=x
    )


def test_an_output_that_is_finite_only_before_or_after_has_moved():
    model, variables, x = net(lambda x: jnp.where(norm()(nn.relu(nn.Dense(3)(x))) < 0, jnp.inf, 1.0))
    assert "which moves outputs by inf of the largest" in error_of(
        variables, [("Dense_0", "BatchNorm_0")], call=model.apply, x=x
    )


def test_no_pairs_in_a_model_without_params():
    variables = {"batch_stats": {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}}
    assert_trees_close(fold_variables(variables, []), variables, 0.0)


def test_outputs_may_move_by_what_is_allowed_and_no_further():
    """In bfloat16 by 4 epsilons: here by 1/32, as the largest output is 1."""
    pair, (_, variables, x) = ("Dense_0", "BatchNorm_0"), net()
    variables["params"]["Dense_0"] = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), variables["params"]["Dense_0"]
    )
    before = variables["batch_stats"]["BatchNorm_0"]["mean"]

    def moving_by(step):
        def call(variables, x):
            mean = variables["batch_stats"]["BatchNorm_0"]["mean"]  # of the folded model it is 0
            return jnp.append(jnp.where(mean == 0, jnp.float32(step), mean - before), jnp.float32(1))

        return call

    folded = fold_variables(variables, [pair], call=moving_by(1 / 32), x=x)
    np.testing.assert_array_equal(folded["batch_stats"]["BatchNorm_0"]["mean"], 0.0)
    text = error_of(variables, [pair], call=moving_by(1 / 32 + 1 / 512), x=x)
    assert "which moves outputs by 3.3e-02 of the largest. Expected at most 3.1e-02." in text
