"""`jbn.checkpoint_policy`: the backward pass measures nothing again, and all comes out as without it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jbn.linen
import jbn.nnx
from jbn._core import forward, normalize
from tests.support.cases import assert_trees_close

X = np.random.default_rng(0).standard_normal((8, 4, 6)).astype(np.float32)
WEIGHTS = [np.random.default_rng(i).standard_normal((6, 6)).astype(np.float32) for i in range(3)]
PARAMS, STATS = jbn.init(6, count=True)
MOMENTS_ALONE = jax.checkpoint_policies.save_only_these_names("jbn_moments")
OPTIONS = {
    "plain": {},
    "relu inside": {"activation": "relu"},
    "residual": {"activation": "relu", "residual": True},
    "mask": {"mask": np.arange(8) < 5},
    "ghost batches": {"virtual_batch_size": 4},
    "renorm": {"renorm": jbn.Renorm(3.0, 5.0)},
    "cumulative": {"momentum": None},
}


def network(use_running_average=False, **options):
    """(loss, new statistics) of three layers; the region of the checkpoint is the whole of it."""

    def run(params, x):
        new = []
        for weights, affine in params:
            x = jnp.tanh(x @ weights)
            settings = options | {"residual": x} if "residual" in options else options
            x, stats = jbn.batch_norm(affine, STATS, x, use_running_average=use_running_average, **settings)
            new.append(stats)
        return jnp.sum(x * jnp.sin(x)), new

    return run


def step(run, policy=None, **settings):
    around = run if policy is None else jax.checkpoint(run, policy=policy, **settings)
    return jax.value_and_grad(around, argnums=(0, 1), has_aux=True)


PARAMETERS = [(weights, PARAMS) for weights in WEIGHTS]


@pytest.mark.parametrize("name", OPTIONS)
def test_values_gradients_and_statistics_are_those_without(name):
    run = network(**OPTIONS[name])
    both = jax.jit(lambda p, x: (step(run)(p, x), step(run, jbn.checkpoint_policy)(p, x)))
    assert_trees_close(*both(PARAMETERS, X), 2e-6)


def counted(is_one, function, *arguments):
    """How many such operations a program has."""

    def count(jaxpr):
        found = 0
        for each in jaxpr.eqns:
            found += is_one(each)
            for value in jax.tree.leaves(each.params, is_leaf=lambda value: hasattr(value, "eqns")):
                inner = getattr(value, "jaxpr", value)
                found += count(inner) if hasattr(inner, "eqns") else 0
        return found

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def measures(operation):
    """Each time a batch is measured, the leading digits of some rows are taken."""
    return operation.primitive.name == "reduce_precision" and operation.params["mantissa_bits"] < 23


def is_product(operation):
    return operation.primitive.name == "dot_general"


@pytest.mark.parametrize("policy", [jbn.checkpoint_policy, MOMENTS_ALONE], ids=["policy", "moments alone"])
def test_nothing_is_measured_again(policy):
    run = network(activation="relu")
    without = counted(measures, step(run), PARAMETERS, X)
    assert counted(measures, step(run, policy), PARAMETERS, X) == without
    assert counted(measures, step(run, jax.checkpoint_policies.nothing_saveable), PARAMETERS, X) > without


@pytest.mark.parametrize("evaluating", [False, True, "traced"])
def test_the_layer_before_a_batch_norm_does_not_run_again(evaluating):
    def products(policy):
        def gradients(weights, x, flag):
            def loss(weights, x):
                for each in weights:
                    mode = flag if evaluating == "traced" else evaluating
                    x = jnp.tanh(jbn.batch_norm(PARAMS, STATS, x @ each, use_running_average=mode)[0])
                return jnp.sum(x)

            return jax.grad(jax.checkpoint(loss, policy=policy))(weights, x)

        return counted(is_product, gradients, WEIGHTS, X, np.array(True))

    everything = products(jax.checkpoint_policies.everything_saveable)
    assert products(jbn.checkpoint_policy) == everything < products(None)


def test_evaluation_comes_out_as_without():
    run = network(use_running_average=True, activation="relu")
    both = jax.jit(lambda p, x: (step(run)(p, x), step(run, jbn.checkpoint_policy)(p, x)))
    assert_trees_close(*both(PARAMETERS, X), 2e-6)


@pytest.mark.parametrize("evaluating", [False, True])
def test_the_names_leave_no_operation_in_a_program(evaluating, monkeypatch):
    def program():
        jax.clear_caches()
        return jax.jit(network(use_running_average=evaluating)).lower(PARAMETERS, X).as_text()

    named = program()
    for module in (forward, normalize):
        monkeypatch.setattr(module, "checkpoint_name", lambda value, name: value)
    assert program() == named


@pytest.mark.parametrize(
    ("devices", "policy"), [(2, jbn.checkpoint_policy), (8, jbn.checkpoint_policy), (8, MOMENTS_ALONE)]
)
def test_no_collective_is_repeated(devices, policy):
    def over_devices(policy):
        run = network(axis_name="data")

        def local(params, x):
            (_, new), gradients = step(run, policy)(params, x)
            return new, gradients[1]

        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P("data"))))

    without, found = over_devices(None), over_devices(policy)
    assert_trees_close(found(PARAMETERS, X), without(PARAMETERS, X), 2e-6)
    counts = [f.lower(PARAMETERS, X).compile().as_text().count(" all-reduce(") for f in (found, without)]
    assert counts[0] == counts[1] > 0


def test_pieces_of_a_concatenation_are_kept_once():
    """As docs/pages/memory.md shows: what batch norms take has 6, 8 and 10 channels, and each piece 2."""
    params = [jbn.init(6 + 2 * i) for i in range(3)]

    def loss(x):
        pieces = [x]
        for each in params:
            y, _ = jbn.batch_norm(*each, jnp.concatenate(pieces, -1), use_running_average=False)
            pieces.append(checkpoint_name(jnp.tanh(y[..., :2]), "piece"))
        return jnp.sum(jnp.concatenate(pieces, -1))

    def kept(policy):
        pullback = jax.make_jaxpr(lambda x: jax.vjp(jax.checkpoint(loss, policy=policy), x)[1])(X)
        shapes = [var.aval.shape for var in set(pullback.jaxpr.outvars)]
        return sorted(shape[-1] for shape in shapes if shape[:2] == X.shape[:2])

    pieces = jax.checkpoint_policies.save_only_these_names("piece", "jbn_moments")
    assert kept(pieces) == [2, 2, 6]
    assert {8, 10} <= set(kept(jbn.checkpoint_policy))


def test_second_derivatives_are_those_without():
    run = network(activation=None)

    def penalty(policy):
        def squares(params, x):
            return sum(jnp.sum(g**2) for g in jax.tree.leaves(step(run, policy)(params, x)[1]))

        return jax.jit(jax.grad(squares, argnums=1))

    assert_trees_close(penalty(jbn.checkpoint_policy)(PARAMETERS, X), penalty(None)(PARAMETERS, X), 2e-5)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        return jbn.linen.BatchNorm(use_running_average=False, activation="relu")(x)


@pytest.mark.parametrize("policy", [None, jbn.checkpoint_policy], ids=["no policy", "policy"])
def test_linen_blocks_update_once(policy, flax_promotion):
    def net(block):
        return nn.Sequential([block(name=f"block{i}") for i in range(2)])

    variables = net(Block).init(jax.random.key(0), X)

    def loss(block):
        def run(params, x):
            variables_ = variables | {"params": params}
            y, new = net(block).apply(variables_, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), new

        return jax.jit(jax.value_and_grad(run, has_aux=True))

    remat = nn.remat(Block, policy=policy)
    assert_trees_close(loss(remat)(variables["params"], X), loss(Block)(variables["params"], X), 2e-6)


@pytest.mark.parametrize("policy", [None, jbn.checkpoint_policy], ids=["no policy", "policy"])
def test_nnx_updates_once(policy, flax_promotion):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.norm = nnx.Linear(6, 6, rngs=rngs), jbn.nnx.BatchNorm(6, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    def loss(around):
        @nnx.jit
        def run(model, x):
            gradients = nnx.grad(lambda model: jnp.sum(jnp.sin(around(lambda model, x: model(x))(model, x))))(
                model
            )
            return gradients, nnx.state(model, nnx.BatchStat)

        return run(Net(nnx.Rngs(0)), X)

    found = loss(lambda f: nnx.remat(f, policy=policy))
    assert_trees_close(*map(nnx.to_pure_dict, (found[0], loss(lambda f: f)[0])), 2e-6)
    assert_trees_close(*map(nnx.to_pure_dict, (found[1], loss(lambda f: f)[1])), 2e-6)
