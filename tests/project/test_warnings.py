"""Warnings name the line of the user's that led to them, whatever lies between."""

import contextlib
import inspect

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jbn.linen
import jbn.nnx
import jbn.tools

pytestmark = pytest.mark.usefixtures("flax_promotion")

ONE = np.ones((1, 3), np.float32)
LAYER = jbn.linen.BatchNorm(use_running_average=False)
VARIABLES = dict(zip(("params", "batch_stats"), jbn.init(3), strict=True))
MUTABLE = ["batch_stats"]


class Model(nn.Module):
    kind: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        return self.kind(use_running_average=False, name="norm")(x)  # here


NESTED = {name: {"norm": tree} for name, tree in VARIABLES.items()}


def layer():
    LAYER.apply(VARIABLES, ONE, mutable=MUTABLE)  # here


def layer_under_jit():
    jax.jit(LAYER.apply, static_argnames="mutable")(VARIABLES, ONE, mutable="batch_stats")  # here


def model():
    Model(jbn.linen.BatchNorm).apply(NESTED, ONE, mutable=MUTABLE)


def replaced():
    with jbn.linen.replace_batch_norm():
        Model(nn.BatchNorm).apply(NESTED, ONE, mutable=MUTABLE)


def nnx_layer():
    layer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    layer(ONE)  # here


def nnx_sequential():
    model = nnx.Sequential(jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    nnx.jit(lambda model, x: model(x))(model, ONE)  # here


def recalibrate():
    idle = {**VARIABLES, "batch_stats": {**VARIABLES["batch_stats"], "idle": jbn.init(3)[1]}}
    jbn.tools.recalibrate(LAYER.apply, idle, [ONE.repeat(2, 0)])  # here


def recalibrate_with_nan():
    jbn.tools.recalibrate(LAYER.apply, VARIABLES, [ONE.repeat(2, 0) * np.float32("nan")])  # here


def context():
    with jbn.linen.replace_batch_norm():  # here
        nn.Dense(2).init(jax.random.key(0), ONE)


def decorator():
    @jbn.linen.replace_batch_norm()
    def run():
        nn.Dense(2).init(jax.random.key(0), ONE)

    run()  # here


def exit_stack():
    with contextlib.ExitStack() as stack:  # here
        stack.enter_context(jbn.linen.replace_batch_norm())
        nn.Dense(2).init(jax.random.key(0), ONE)


def nnx_replace():
    jbn.nnx.replace_batch_norm(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))  # here


@pytest.mark.parametrize(
    "run",
    [
        layer,
        layer_under_jit,
        model,
        replaced,
        nnx_layer,
        nnx_sequential,
        recalibrate,
        recalibrate_with_nan,
        context,
        decorator,
        exit_stack,
        nnx_replace,
    ],
)
def test_a_warning_names_the_line_of_the_user(run):
    with pytest.warns(UserWarning, match=r"^jbn\.") as found:
        run()
    (warning,) = found
    lines, first = inspect.getsourcelines(Model if run in (model, replaced) else run)
    (here,) = [first + place for place, line in enumerate(lines) if "# here" in line]
    assert (warning.filename, warning.lineno) == (__file__, here)
