"""Domain-specific batch norm, arXiv 1906.03950: the recipes of the cookbook need nothing new in the core."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests.project.test_documentation import ROOT, blocks
from tests.support.cases import assert_close, tolerance

TOLERANCE = tolerance(np.float32)
RNG = np.random.default_rng(0)
DOMAIN = np.array([0, 2, 0, 2, 2, 0, 0, 2], np.int32)  # none of domain 1
X = (RNG.standard_normal((8, 5, 3)) * 2 + 10 * DOMAIN[:, None, None]).astype(np.float32)
COOKBOOK = ROOT / "docs/pages/cookbook.md"
PARAMS = {"scale": np.array([0.5, 1, 2], np.float32), "bias": np.array([0, 1, -1], np.float32)}
STATS = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), jbn.init(3)[1])


@pytest.fixture(scope="module")
def recipes():
    namespace = {"jax": jax, "jnp": jnp, "jbn": jbn}
    for source in blocks(COOKBOOK, "python"):
        if "_domain(" in source:
            exec(compile(source, COOKBOOK, "exec"), namespace)
    return namespace


def test_a_domain_per_example(recipes):
    run = jax.jit(lambda *args: recipes["by_domain"](*args, use_running_average=False, momentum=0.0))
    y, new = run(PARAMS, STATS, X, DOMAIN)
    for index in (0, 2):
        own = index == DOMAIN
        alone, stats = jbn.batch_norm(PARAMS, jbn.init(3)[1], X[own], use_running_average=False, momentum=0.0)
        assert_close(y[own], alone, TOLERANCE)
        assert_close(new["mean"][index], stats["mean"], TOLERANCE)
        assert_close(new["var"][index], stats["var"], TOLERANCE)
    np.testing.assert_array_equal(new["mean"][1], np.zeros(3))
    np.testing.assert_array_equal(new["var"][1], np.ones(3))


def test_gradients_stay_in_their_domain(recipes):
    def loss(x):
        y, _ = recipes["by_domain"](PARAMS, STATS, x, DOMAIN, use_running_average=False)
        return jnp.sum(jnp.sin(y)[DOMAIN == 0])

    dx = jax.grad(loss)(X)
    np.testing.assert_array_equal(dx[DOMAIN == 2], np.zeros((4, 5, 3)))
    assert (np.abs(dx[DOMAIN == 0]) > 0).any()


def test_a_domain_per_call(recipes):
    run = jax.jit(lambda *args: recipes["of_domain"](*args, use_running_average=False, momentum=0.0))
    for index in (0, 2):
        x = X[index == DOMAIN]
        y, new = run(PARAMS, STATS, x, np.int32(index))
        alone, stats = jbn.batch_norm(PARAMS, jbn.init(3)[1], x, use_running_average=False, momentum=0.0)
        assert_close(y, alone, TOLERANCE)
        assert_close(new["mean"][index], stats["mean"], TOLERANCE)
        np.testing.assert_array_equal(new["mean"][1], np.zeros(3))
