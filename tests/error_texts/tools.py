"""Wrong calls of the tools that measure and average, and the whole text of each error."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
import jbn.tools
from tests.support.recalibration import X, linen

LAYER = jbn.linen.BatchNorm(use_running_average=False)
STATS = {"batch_stats": {"bn": jbn.init(3)[1]}}
FORMS = (
    "Expected a mapping from path to jbn.Moments, or variables or an NNX module with batch_moments. Run the "
    "model in training mode: linen with mutable=['batch_stats', 'batch_moments'], NNX after "
    "jbn.nnx.keep_batch_moments(model)."
)
NO_NORM = (
    "Expected one with a batch norm: a mean and a var in batch_stats. Pass all variables of the model, "
    "{'params': params, 'batch_stats': batch_stats}."
)
STREAM = "Expected batches, one after the other. Pass a list or a generator; for a single batch, [batch]."
PAIR = (
    "Expected one that returns (y, new variables), as model.apply(..., mutable=[...]) does. Hand the options "
    "on: lambda variables, x, **options: model.apply(variables, x, train=True, **options). Pure functions "
    "return (y, {'batch_moments': {path: moments}})."
)
MODE = (
    "Expected a model in training mode. Run it with use_running_average=False and frozen=False, and see that "
    "masks have rows. A model of pure functions returns (y, {'batch_moments': {path: moments}}), with "
    "the moments of jbn.batch_norm(..., return_moments=True), or runs the stream with momentum=None from "
    "jbn.init(features, count=True)."
)


class Mine(nn.BatchNorm):
    pass


class MineInNnx(nnx.BatchNorm):
    pass


def bridged():
    layer = nnx.bridge.to_linen(nnx.BatchNorm, 3, use_running_average=False)
    return jbn.tools.recalibrate(layer.apply, layer.init(jax.random.key(0), X), [X])


def unmeasured():
    """Calls in which no batch norm has rows in training mode, with their variables."""
    layer, stats = jbn.linen.BatchNorm(use_running_average=False), jbn.init(3)[1]
    variables = dict(zip(("params", "batch_stats"), jbn.init(3), strict=True))
    return {
        "evaluation": (jbn.linen.BatchNorm(use_running_average=True).apply, variables),
        "frozen": (jbn.linen.BatchNorm(use_running_average=False, frozen=True).apply, variables),
        "no rows": (functools.partial(layer.apply, mask=np.zeros(50, bool)), variables),
        "evaluation of NNX": (lambda model, x: model(x, True), jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))),
        "pure functions": (
            lambda variables, x: jbn.batch_norm({}, stats, x, use_running_average=False),
            {"params": {}, "batch_stats": stats},
        ),
    }


REPLICAS = "Pass batch_stats as pmap or vmap returns it, with the axis of the devices."


def recalibrate(apply_fn=LAYER.apply, batches=(X,), variables=None, **options):
    return jbn.tools.recalibrate(
        apply_fn, STATS | {"params": {}} if variables is None else variables, batches, **options
    )


def merge(*, axis=0, **entries):
    return jbn.tools.merge_replicas(
        {"bn": {name: np.asarray(value) for name, value in entries.items()}}, axis
    )


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def pure(variables, x):
    return x, {"batch_moments": {"bn": jbn.moments(x)}}


TEXTS = {
    "no batches": (
        lambda: jbn.tools.recalibrate(linen()[1], linen()[0], []),
        "jbn.tools.recalibrate: batches is empty. Expected one batch or more. A generator gives its batches "
        "only once.",
    ),
    "no batch norm": (
        lambda: jbn.tools.recalibrate(None, {"params": {}}, [X]),
        f"jbn.tools.recalibrate: variables is a model without arrays. {NO_NORM}",
    ),
    "a module without batch norm": (
        lambda: jbn.tools.freeze(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        f"jbn.tools.freeze: variables is a model with the collections params. {NO_NORM}",
    ),
    "statistics that are no collection": (
        lambda: recalibrate(variables={"batch_stats": X}),
        "jbn.tools.recalibrate: variables['batch_stats'] is float32[50,3]. Expected a nested dict of arrays. "
        "Pass all variables of the model, {'params': params, 'batch_stats': batch_stats}.",
    ),
    "no function": (
        lambda: recalibrate(apply_fn=None),
        "jbn.tools.recalibrate: apply_fn is None. Expected a function that runs the model in training mode. "
        "Pass model.apply, or a function around it, and for NNX lambda model, x: model(x).",
    ),
    "a subclass of Flax's layer": (
        lambda: recalibrate(
            Mine(use_running_average=False).apply,
            variables=dict(zip(("params", "batch_stats"), jbn.init(3), strict=True)),
        ),
        "jbn.tools.recalibrate: apply_fn is one with batch norms of Mine, which are not measured. "
        "Expected batch norms of Flax or jbn, and no subclasses or copies of them. Call it inside of a `with "
        "jbn.linen.replace_batch_norm(classes=(Mine,)):`.",
    ),
    "a subclass of Flax's layer in NNX": (
        lambda: recalibrate(lambda model, x: model(x), variables=MineInNnx(3, rngs=nnx.Rngs(0))),
        "jbn.tools.recalibrate: apply_fn is one with batch norms of MineInNnx, which are not measured. "
        "Expected batch norms of Flax or jbn, and no subclasses or copies of them. Call "
        "jbn.nnx.replace_batch_norm(model, classes=(MineInNnx,)) before.",
    ),
    "a function that gives y alone": (
        lambda: recalibrate(lambda variables, x, **options: x),
        f"jbn.tools.recalibrate: apply_fn is one that returns float32[50,3]. {PAIR}",
    ),
    "a function that gives pairs of others": (
        lambda: recalibrate(lambda variables, x, **options: (x, x)),
        f"jbn.tools.recalibrate: apply_fn is one that returns a tuple. {PAIR}",
    ),
    "a function that does not take mutable": (
        lambda: recalibrate(lambda variables, x: x),
        f"jbn.tools.recalibrate: apply_fn is one that returns float32[50,3]. {PAIR}",
    ),
    "layers of NNX in linen": (
        bridged,
        "jbn.tools.recalibrate: apply_fn is one that runs the model itself by nnx.bridge.to_linen. Expected "
        "batch norms of linen in a linen model. Use jbn.linen.BatchNorm there, whose variables are the same, "
        "or recalibrate the NNX module.",
    ),
    **{
        f"nothing measured: {name}": (
            functools.partial(recalibrate, apply_fn, variables=variables),
            "jbn.tools.recalibrate: apply_fn is one in which no batch norm had rows in training mode. "
            f"{MODE}",
        )
        for name, (apply_fn, variables) in unmeasured().items()
    },
    "a number for batches": (
        lambda: recalibrate(batches=3),
        f"jbn.tools.recalibrate: batches is 3. {STREAM}",
    ),
    "no stream": (
        lambda: recalibrate(batches=None),
        f"jbn.tools.recalibrate: batches is None. {STREAM}",
    ),
    "one batch for many": (
        lambda: recalibrate(batches=X),
        f"jbn.tools.recalibrate: batches is float32[50,3]. {STREAM}",
    ),
    "a dict for batches": (
        lambda: recalibrate(batches={"x": X}),
        f"jbn.tools.recalibrate: batches is a dict. {STREAM}",
    ),
    "no batches at most": (
        lambda: recalibrate(max_batches=0),
        "jbn.tools.recalibrate: max_batches is 0. Expected an integer from 1 up. None takes all batches.",
    ),
    "less than no batches": (
        lambda: recalibrate(max_batches=-1),
        "jbn.tools.recalibrate: max_batches is -1. Expected an integer from 1 up. None takes all batches.",
    ),
    "a text of batches": (
        lambda: recalibrate(max_batches="3"),
        "jbn.tools.recalibrate: max_batches is '3'. Expected an integer from 1 up. None takes all batches.",
    ),
    "tolerance below 0": (
        lambda: recalibrate(tolerance=-1),
        "jbn.tools.recalibrate: tolerance is -1. Expected a number from 0 up. None takes all batches.",
    ),
    "tolerance NaN": (
        lambda: recalibrate(tolerance=float("nan")),
        "jbn.tools.recalibrate: tolerance is nan. Expected a number from 0 up. None takes all batches.",
    ),
    "a text of tolerance": (
        lambda: recalibrate(tolerance="a"),
        "jbn.tools.recalibrate: tolerance is 'a'. Expected a number from 0 up. None takes all batches.",
    ),
    "under jit": (
        lambda: jax.jit(lambda variables: recalibrate(variables=variables))(STATS),
        "jbn.tools.recalibrate: variables is traced. Expected arrays with values. Call it outside of jit, "
        "grad and scan: it compiles apply_fn by itself.",
    ),
    "statistics of some layers alone": (
        lambda: recalibrate(
            lambda v, x, **options: (x, {"batch_moments": {"new": {"moments": jbn.moments(x)}}})
        ),
        "jbn.tools.recalibrate: variables is a model without batch_stats for new. Expected those of every "
        "batch norm that runs. Pass all variables of the model, as init or training returned them.",
    ),
    "moments of pure functions at other paths": (
        lambda: recalibrate(
            lambda v, x: (x, {"batch_moments": {"a": jbn.moments(x), "b": {"c": jbn.moments(x)}}})
        ),
        "jbn.tools.recalibrate: variables is a model without batch_stats for a, b/c. Expected those of every "
        "batch norm that runs. Pass all variables of the model, as init or training returned them.",
    ),
    "apply moments of pure functions at other paths": (
        lambda: jbn.tools.apply_moments(STATS, {"batch_moments": {"a": jbn.moments(X)}}),
        "jbn.tools.apply_moments: moments is one with a. Expected paths of batch norms: bn. "
        "Take moments and variables from the same model.",
    ),
    "no moments": (
        lambda: jbn.tools.apply_moments(STATS),
        f"jbn.tools.apply_moments: moments is a mapping without jbn.Moments at batch_stats. {FORMS}",
    ),
    "a leaf that is no moments": (
        lambda: jbn.tools.apply_moments(STATS, {"bn": jbn.moments(X).mean}),
        f"jbn.tools.apply_moments: moments is a mapping without jbn.Moments at bn. {FORMS}",
    ),
    "statistics with a count for moments": (
        lambda: jbn.tools.apply_moments(STATS, {"bn": jbn.init(3)[1] | {"count": jnp.int32(1)}}),
        f"jbn.tools.apply_moments: moments is a mapping without jbn.Moments at bn. {FORMS}",
    ),
    "moments that a checkpoint took apart": (
        lambda: jbn.tools.apply_moments(STATS | {"batch_moments": {"bn": {"moments": {"count": X[0]}}}}),
        f"jbn.tools.apply_moments: moments is a mapping without jbn.Moments at bn/moments/count. {FORMS}",
    ),
    "moments of another model": (
        lambda: jbn.tools.apply_moments(linen()[0], {("third",): jbn.moments(X)}),
        "jbn.tools.apply_moments: moments is one with third. Expected paths of batch norms: first, second. "
        "Take moments and variables from the same model.",
    ),
    "moments of another size": (
        lambda: jbn.tools.apply_moments(STATS, {"bn": jbn.moments(X[:, :2])}),
        "jbn.tools.apply_moments 'bn': batch_stats['mean'] is float32[3]. Expected shape (2,). Make them for "
        "as many features as x has (jbn.init(features), num_features), or set axis to x's feature axis.",
    ),
    "momentum of 2": (
        lambda: jbn.tools.apply_moments(STATS, {"bn": jbn.moments(X)}, momentum=2),
        "jbn.tools.apply_moments: momentum is 2. Expected a number from 0 to 1, a scalar array, or None "
        "(cumulative). It weighs the old statistics: PyTorch's momentum=0.1 is 0.9 here.",
    ),
    "replicas of two numbers": (
        lambda: jbn.tools.merge_replicas(
            {"a": {"mean": zeros(2, 3), "var": zeros(2, 3)}, "b": {"mean": zeros(3, 3), "var": zeros(3, 3)}}
        ),
        "jbn.tools.merge_replicas: batch_stats is arrays of float32[2,3], float32[3,3]. Expected one number "
        f"of replicas along axis 0, in all of them. {REPLICAS}",
    ),
    "no axis of replicas": (
        lambda: merge(mean=zeros(2, 3), var=zeros(2, 3), axis=2),
        "jbn.tools.merge_replicas: batch_stats is arrays of float32[2,3]. Expected one number of replicas "
        f"along axis 2, in all of them. {REPLICAS}",
    ),
    "an axis that is no number": (
        lambda: merge(mean=zeros(2, 3), var=zeros(2, 3), axis="a"),
        "jbn.tools.merge_replicas: axis is 'a'. Expected an integer. Name the axis of the devices: 0 behind "
        "pmap and vmap.",
    ),
    **{
        f"replicas of {name}": (
            lambda given=given: jbn.tools.merge_replicas(given),
            f"jbn.tools.merge_replicas: batch_stats is {given!r}. Expected a collection, an nnx.State or an "
            f"NNX module. {REPLICAS}",
        )
        for name, given in (("None", None), ("a number", 3), ("a list", [1.0]))
    },
    "no statistics of replicas": (
        lambda: jbn.tools.merge_replicas({}),
        "jbn.tools.merge_replicas: batch_stats is without a batch norm. Expected a mean and a var in one "
        f"place. {REPLICAS}",
    ),
    "statistics of other layers": (
        lambda: jbn.tools.merge_replicas(
            {"bn": {"mean": zeros(2, 3), "var": zeros(2, 3)}, "spectral": {"u": zeros(2, 1, 4)}}
        ),
        "jbn.tools.merge_replicas: batch_stats is one with spectral/u. Expected mean, var, count and rows of "
        "batch norms alone. Leave the others out: jbn cannot know how they are merged.",
    ),
    "replicas of integers": (
        lambda: merge(mean=zeros(2, 3, dtype=np.int32), var=zeros(2, 3)),
        "jbn.tools.merge_replicas 'bn': mean and var is int32[2,3] and float32[2,3]. Expected floating "
        f"arrays of one shape. {REPLICAS}",
    ),
    "replicas of mean and var apart": (
        lambda: merge(mean=zeros(2, 3), var=zeros(2, 1)),
        "jbn.tools.merge_replicas 'bn': mean and var is float32[2,3] and float32[2,1]. Expected floating "
        f"arrays of one shape. {REPLICAS}",
    ),
    "replicas that are one": (
        lambda: merge(mean=np.arange(8, dtype=np.float32), var=np.ones(8, np.float32)),
        "jbn.tools.merge_replicas 'bn': mean is float32[8]. Expected an axis of replicas and one of "
        f"channels. {REPLICAS}",
    ),
    "replicas that are one, with a count": (
        lambda: jbn.tools.merge_replicas(jbn.init(3, count=True)[1]),
        "jbn.tools.merge_replicas: batch_stats is arrays of float32[3], int32[]. Expected one number of "
        f"replicas along axis 0, in all of them. {REPLICAS}",
    ),
    "averages of two trees": (
        lambda: jbn.tools.ema({"a": zeros(2)}, {"b": zeros(2)}, 0.5),
        "jbn.tools.ema: new is of another structure than average. Expected the same model after a step of "
        "training. Start with average = jax.tree.map(jnp.copy, model), or nnx.clone(model).",
    ),
    "averages of a module and a dict": (
        lambda: jbn.tools.ema(jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), {"a": zeros(2)}, 0.5),
        "jbn.tools.ema: new is of another structure than average. Expected the same model after a step of "
        "training. Start with average = jax.tree.map(jnp.copy, model), or nnx.clone(model).",
    ),
    "averages of a dict and a module": (
        lambda: jbn.tools.ema({"a": zeros(2)}, jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), 0.5),
        "jbn.tools.ema: new is of another structure than average. Expected the same model after a step of "
        "training. Start with average = jax.tree.map(jnp.copy, model), or nnx.clone(model).",
    ),
    "averages of two shapes": (
        lambda: jbn.tools.ema({"a": zeros(2)}, {"a": zeros(3)}, 0.5),
        "jbn.tools.ema: new['a'] is float32[3]. Expected shape (2,), as in average. Average one and the same "
        "model.",
    ),
    **{
        f"a decay of {decay!r}": (
            lambda decay=decay: jbn.tools.ema({"a": zeros(2)}, {"a": zeros(2)}, decay),
            f"jbn.tools.ema: decay is {decay!r}. Expected a number from 0 to 1, or a scalar array. It weighs "
            "the old average: 0.999 is usual.",
        )
        for decay in (None, "s", 1.5, -0.1, float("nan"), True)
    },
    "a decay beyond 1 in an array": (
        lambda: jbn.tools.ema({"a": zeros(2)}, {"a": zeros(2)}, jnp.float32(1.5)),
        "jbn.tools.ema: decay is float32[]. Expected a number from 0 to 1, or a scalar array. It weighs the "
        "old average: 0.999 is usual.",
    ),
    "a decay for each channel": (
        lambda: jbn.tools.ema({"a": zeros(2)}, {"a": zeros(2)}, jnp.ones(2)),
        "jbn.tools.ema: decay is float32[2]. Expected a number from 0 to 1, or a scalar array. It weighs the "
        "old average: 0.999 is usual.",
    ),
    "moments of two shapes from one layer": (
        lambda: jbn.tools.recalibrate(
            pure, STATS, [np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)]
        ),
        "jbn.tools.recalibrate 'bn': moments is (float32[3], float32[2]). Expected one or more "
        "jbn.Moments of one shape. Merge the moments of one layer, as from jbn.moments(x).",
    ),
}
