"""What kind of tree goes into a tool comes out of it: dicts, frozen dicts, boxes with names of axes."""

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.core import freeze

import jbn.linen
import jbn.tools

pytestmark = pytest.mark.usefixtures("flax_promotion")

X = (np.random.default_rng(0).standard_normal((16, 3)) * 2 + 5).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, **options):
        x = nn.Dense(4, name="dense")(x)
        norm = jbn.linen.BatchNorm(use_running_average=not train, momentum=0.9, debias=True, name="norm")
        return norm(x, **options)


VARIABLES = Net().init(jax.random.key(0), X)
KINDS = {
    "dict": lambda tree: tree,
    "frozen": freeze,
    "dict of frozen": lambda tree: {name: freeze(part) for name, part in tree.items()},
    "boxed": lambda tree: jax.tree.map(
        lambda leaf: nn.Partitioned(leaf, (None,) * (leaf.ndim - 1) + ("model",)), tree
    ),
}


def apply(variables, x, **options):
    return Net().apply(variables, x, **options)


def measured(variables):
    _, new = apply(variables, X, train=True, update_batch_stats=False, mutable=["batch_moments"])
    return new


def merged(variables):
    """Two replicas, merged; a box keeps the names of its axes."""
    stats = variables["batch_stats"]
    return jbn.tools.merge_replicas(jax.tree.map(lambda leaf: np.stack([leaf, leaf]), stats))


TOOLS = {
    "merge_replicas": merged,
    "recalibrate": lambda v: jbn.tools.recalibrate(
        lambda *args, **options: apply(*args, train=True, **options), v, [X]
    ),
    "apply_moments": lambda v: jbn.tools.apply_moments(v, measured(v)),
    "debias": lambda v: jbn.tools.debias(v, momentum=0.9),
    "ema": lambda v: jbn.tools.ema(v, jax.tree.map(lambda leaf: leaf + 1, v), 0.5),
    "fold_variables": lambda v: jbn.tools.fold_variables(v, [("dense", "norm")]),
    "weight_decay_mask": jbn.tools.weight_decay_mask,
    "freeze": jbn.tools.freeze,
}


@pytest.mark.parametrize("kind", list(KINDS)[1:])
@pytest.mark.parametrize("tool", TOOLS)
def test_the_kind_of_tree_stays(tool, kind):
    given = KINDS[kind](VARIABLES)
    result = TOOLS[tool](given)
    part = {"weight_decay_mask": "params", "freeze": "params", "merge_replicas": "batch_stats"}.get(tool)
    wanted = given[part] if part else given
    assert jax.tree.structure(result) == jax.tree.structure(wanted)
    found, expected = (jax.tree.leaves(tree) for tree in (result, TOOLS[tool](VARIABLES)))
    chex.assert_trees_all_equal(found, expected)
