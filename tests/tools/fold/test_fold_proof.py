"""The proof that folding left the outputs as they were: what passes it, in every dtype, and what does not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

from jbn.tools import fold_variables
from tests.support.cases import assert_close, assert_trees_close, tolerance
from tests.support.fold_models import (
    EPSILON,
    TOLERANCE,
    assert_folds,
    net,
    norm,
    random,
    shared,
    twice_normalized,
)

pytestmark = pytest.mark.usefixtures("flax_promotion")


def test_a_frozen_dict_stays_one():
    model, variables, x = net()
    result = fold_variables(freeze(variables), call=model.apply, x=x)
    assert isinstance(result, FrozenDict)
    assert_trees_close(result.unfreeze(), fold_variables(variables, call=model.apply, x=x), 0.0)


def test_inputs_that_are_no_floats_stay_as_they_are():
    def run(x):
        known = jnp.where(x["tokens"] > 90, x["weights"], np.nan)  # other tokens would be noticed
        return norm()(nn.Dense(3)(known))

    assert_folds(run, {"tokens": np.array([91, 99, 95])[:, None], "weights": random(3, 2)})


def test_the_proof_is_at_full_precision():
    model, variables, x = net()
    seen = []

    def call(variables, x):
        seen.append(jax.config.jax_default_matmul_precision)
        return model.apply(variables, x)

    fold_variables(variables, call=call, x=x)
    assert seen == [None, "highest"]  # to find the pairs, and to compare


def test_a_shared_pair_is_folded_by_name():
    """Where a layer and its batch norm always run together, folding is right; only finding is careful."""

    def run(x):
        dense, bn = nn.Dense(3), norm()
        return bn(dense(nn.relu(bn(dense(x)))))

    assert_folds(run, pairs=[("Dense_0", "BatchNorm_0")], accuracy=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_models_of_low_precision(dtype):
    def run(x):
        return norm(param_dtype=dtype)(nn.Dense(3, param_dtype=dtype)(x))

    model, variables, x = net(run, random(4, 3).astype(dtype))
    result = fold_variables(variables, call=model.apply, x=x)
    assert model.apply(result, x).dtype == dtype
    assert result["params"]["Dense_0"]["kernel"].dtype == dtype
    pairs = [("Dense_0", "BatchNorm_0")]
    assert_trees_close(fold_variables(variables, pairs, epsilon=EPSILON), result, 0.0)


def test_layers_that_compute_in_low_precision():
    run = lambda x: norm()(nn.Dense(3, dtype=jnp.bfloat16)(x))  # noqa: E731
    folded = assert_folds(run, accuracy=tolerance(jnp.bfloat16))
    assert folded["params"]["Dense_0"]["kernel"].dtype == np.float32


def test_a_scale_too_coarse_for_epsilon():
    """bfloat16 rounds sqrt(1 + 1e-3) to 1."""

    def run(x):
        return nn.BatchNorm(True, epsilon=1e-3, param_dtype=jnp.bfloat16, use_bias=False)(nn.Dense(3)(x))

    model, variables, x = net(run)
    result = fold_variables(variables, call=lambda v, x: model.apply(v, x).astype(np.float32), x=x)
    np.testing.assert_array_equal(result["params"]["BatchNorm_0"]["scale"].astype(np.float32), 1.0)
    assert_close(model.apply(result, x), model.apply(variables, x), TOLERANCE)


def used_elsewhere(x):
    y = nn.Dense(3)(x)
    good = norm(name="good_norm")(nn.Dense(3, name="good")(x))
    return norm()(y) + y + good


def test_only_the_pair_that_does_harm_is_blamed():
    model, variables, x = net(used_elsewhere)
    wrong = "pairs is a sequence with Dense_0 -> BatchNorm_0, which moves"
    pairs = [("Dense_0", "BatchNorm_0"), ("good", "good_norm")]
    with pytest.raises(ValueError, match=wrong) as caught:
        fold_variables(variables, pairs, call=model.apply, x=x)
    assert "good" not in str(caught.value)
    assert_folds(used_elsewhere, pairs=[("good", "good_norm")])


HARMFUL = {
    "something between": (lambda x: norm()(nn.relu(nn.Dense(3)(x))), "Dense_0"),
    "the batch norm stands before": (lambda x: nn.Dense(3)(norm()(x)), "Dense_0"),
    "the batch norm of another layer": (
        lambda x: nn.Dense(3, name="other")(nn.relu(norm()(nn.Dense(3)(x)))),
        "other",
    ),
    "a layer that runs twice": (shared, "Dense_0"),
    "two batch norms behind one layer": (twice_normalized, "Dense_0"),
}


@pytest.mark.parametrize(("run", "layer"), HARMFUL.values(), ids=HARMFUL)
def test_folding_that_changes_the_outputs_is_refused(run, layer):
    model, variables, x = net(run)
    with pytest.raises(ValueError, match=f"{layer} -> BatchNorm_0, which moves outputs by"):
        fold_variables(variables, [(layer, "BatchNorm_0")], call=model.apply, x=x)


def test_pairs_that_do_harm_only_together_are_all_named():
    """Each of two layers is off by less than what is allowed, and both are not."""
    scale = np.float32(1 + 6e-6)
    one = {"kernel": np.ones((1, 1), np.float32)}
    stats = {"mean": np.zeros(1, np.float32), "var": np.ones(1, np.float32)}
    tree = dict.fromkeys(("a", "b"), one) | {name: {"scale": scale[None]} for name in ("c", "d")}
    variables = {"params": tree, "batch_stats": {"c": stats, "d": stats}}
    pairs = [("a", "c"), ("b", "d")]

    def call(variables, x):
        return x * variables["params"]["a"]["kernel"] * variables["params"]["b"]["kernel"]

    with pytest.raises(ValueError, match=r"a -> c, b -> d, which moves outputs by 1\.\de-05 of"):
        fold_variables(variables, pairs, call=call, x=random(4, 1), epsilon=0.0)


def test_nnx_folding_that_changes_the_outputs_is_refused():
    class Wrong(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.bn = nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
            self.bn.var.set_value(jnp.full(3, 2.0))

        def __call__(self, x):
            y = self.dense(x)
            return self.bn(y) * y

    with pytest.raises(ValueError, match="dense -> bn, which moves outputs by"):
        fold_variables(Wrong(nnx.Rngs(0)), [("dense", "bn")], x=random(4, 3))
