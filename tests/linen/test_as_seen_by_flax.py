"""What Flax shows of modules and their methods: of our layer it is what it shows of its own."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest

import jbn.linen

pytestmark = pytest.mark.usefixtures("flax_promotion")
X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
KINDS = (nn.BatchNorm, jbn.linen.BatchNorm)


class Twice(nn.Module):
    """One block, used twice."""

    kind: type[nn.Module]

    @nn.compact
    def __call__(self, x, train=False):
        norm = self.kind(use_running_average=not train, name="norm")
        return norm(norm(nn.Dense(3)(x)))


def both(show):
    """What is shown of Flax's layer and of ours, which has another module path."""
    return [show(kind) for kind in KINDS]


@pytest.mark.parametrize("settings", [{}, {"show_repeated": True, "compute_flops": True}], ids=str)
def test_tables(settings):
    def rows(kind):
        table = Twice(kind).tabulate(jax.random.key(0), X, console_kwargs={"width": 200}, **settings)
        assert "BatchNorm" in table
        return [re.sub(r"\d[\d,]* *│?$", "", line).split("│")[1:4] for line in table.splitlines()]

    theirs, ours = both(rows)
    assert ours == theirs


def test_intermediates_of_all_methods():
    def captured(kind):
        model = Twice(kind)
        variables = model.init(jax.random.key(0), X)
        _, state = model.apply(variables, X, capture_intermediates=lambda module, method: True)
        return jax.tree.map(np.shape, state["intermediates"])

    theirs, ours = both(captured)
    assert ours == theirs


def test_interceptors_see_the_same_methods():
    def methods(kind):
        seen = []

        def note(call, args, kwargs, context):
            seen.append((type(context.module).__name__, context.method_name))
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            Twice(kind).init(jax.random.key(0), X)
        return seen

    theirs, ours = both(methods)
    assert ours == theirs


def test_names_in_profiles():
    """Linen names what runs in any other method than `__call__` by it, as `norm.method`."""

    def names(kind):
        variables = Twice(kind).init(jax.random.key(0), X)
        text = jax.jit(Twice(kind).apply).lower(variables, X).as_text(debug_info=True)
        assert "Twice/norm/" in text
        return set(re.findall(r"norm\.\w+", text))

    theirs, ours = both(names)
    assert ours == theirs
