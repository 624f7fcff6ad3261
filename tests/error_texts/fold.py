"""Wrong calls of folding, and the whole text of each error."""

import functools

import jax
import numpy as np

from jbn.tools import fold, fold_variables
from tests.support.fold_models import arrays, net, random, stacked

ONE = {"kernel": np.ones((1, 1), np.float32)}
ONE_NORM = {"scale": np.full(1, 2, np.float32)}
ONE_STATS = {"mean": np.zeros(1, np.float32), "var": np.ones(1, np.float32)}
ONE_MODEL = {"params": {"a": ONE, "b": ONE_NORM}, "batch_stats": {"b": ONE_STATS}}
KERNEL, BIAS, PARAMS, STATS = arrays()
FLOATS = "Expected a floating or complex array. Fold first, and quantize then."
MODEL_FIX = (
    "Pass call=lambda variables, x: model.apply(variables, x, train=False) and an example x, or "
    "pairs=[('Conv_0', 'BatchNorm_0')]."
)
SIZE_FIX = "Set axis to where the kernel has its output channels; fold stacked layers one by one."
AXIS_FIX = "Name those with the output channels: -1, or -2 for transpose_kernel=True."
MOVED_FIX = (
    "Leave the pair out: something else uses the layer's output too, or stands between it and the batch "
    "norm, or its epsilon is another, or the new values do not fit their dtype."
)


PAIRS_TEXT = (
    "Expected pairs of a layer and a batch norm. For example [('block/Conv_0', 'block/BatchNorm_0')]."
)
ONE_X = np.ones((1, 1), np.float32)


def stacked_model():
    _, variables, _ = net(stacked("scan"), random(3, 3))
    return fold_variables(variables, [("ScanStep_0/Dense_0", "ScanStep_0/BatchNorm_0")])


def with_outputs(end):
    model, variables, x = net()
    return fold_variables(variables, call=lambda variables, x: end(model.apply(variables, x)), x=x)


def out_of_range_of_float16(var):
    layer = {"kernel": np.ones((3, 1), np.float16)}
    stats = ONE_STATS | {"var": np.full(1, var, np.float32)}
    variables = {"params": {"a": layer}, "batch_stats": {"b": stats}}
    return fold_variables(variables, [("a", "b")], epsilon=0.0)


def with_stats(**stats):
    return {"params": {"a": ONE}, "batch_stats": {"b": ONE_STATS | stats}}


TEXTS = {
    "a quantized kernel": (
        lambda: fold(np.ones((3, 4), np.int8), None, PARAMS, STATS),
        f"jbn.tools.fold: kernel is int8[3,4]. {FLOATS}",
    ),
    "no kernel": (
        lambda: fold(None, BIAS, PARAMS, STATS),
        f"jbn.tools.fold: kernel is None. {FLOATS}",
    ),
    "a bias of text": (
        lambda: fold(KERNEL, "bias", PARAMS, STATS),
        f"jbn.tools.fold: bias is 'bias'. {FLOATS}",
    ),
    **{
        f"axis {axis!r}": (
            functools.partial(fold, KERNEL, BIAS, PARAMS, STATS, axis=axis),
            f"jbn.tools.fold: axis is {axis!r}. Expected one or several different axes of kernel = "
            f"float32[3,4]. {AXIS_FIX}",
        )
        for axis in (2, (1, -1), (), "C")
    },
    "negative epsilon": (
        lambda: fold(KERNEL, BIAS, PARAMS, STATS, epsilon=-1.0),
        "jbn.tools.fold: epsilon is -1.0. Expected a static number from 0 up. The usual one is 1e-5.",
    ),
    "params of a model": (
        lambda: fold(KERNEL, BIAS, {"BatchNorm_0": PARAMS}, STATS),
        "jbn.tools.fold: params is a mapping with BatchNorm_0. Expected only scale, bias. Pass the "
        "collection of one layer, for example variables['params']['BatchNorm_0'].",
    ),
    "no variance": (
        lambda: fold(KERNEL, BIAS, PARAMS, {"mean": STATS["mean"]}),
        "jbn.tools.fold: batch_stats['var'] is None. Expected shape (4,), that of axis -1 of kernel = "
        "float32[3,4]. " + SIZE_FIX,
    ),
    "the wrong axis": (
        lambda: fold(KERNEL, BIAS, PARAMS, STATS, axis=-2),
        "jbn.tools.fold: params['bias'] is float32[4]. Expected shape (3,), that of axis -2 of kernel = "
        "float32[3,4]. " + SIZE_FIX,
    ),
    "a bias of another size": (
        lambda: fold(KERNEL, BIAS[:3], PARAMS, STATS),
        "jbn.tools.fold: bias is float32[3]. Expected shape (4,), that of axis -1 of kernel = float32[3,4]. "
        + SIZE_FIX,
    ),
    "no pairs and no call": (
        lambda: fold_variables(ONE_MODEL, x=np.ones((1, 1), np.float32)),
        "jbn.tools.fold_variables: pairs is None, and no batch norm was seen to run. Expected pairs, or the "
        "call of a model and its x. " + MODEL_FIX,
    ),
    "a call of no batch norm": (
        lambda: fold_variables(ONE_MODEL, call=lambda variables, x: x, x=np.ones((1, 1), np.float32)),
        "jbn.tools.fold_variables: pairs is None, and no batch norm was seen to run. Expected pairs, or the "
        "call of a model and its x. " + MODEL_FIX,
    ),
    "a call without x": (
        lambda: fold_variables(ONE_MODEL, call=lambda variables, x: x),
        "jbn.tools.fold_variables: x is None. Expected an example input of call. One example with its batch "
        "axis will do.",
    ),
    "a pair alone": (
        lambda: fold_variables(ONE_MODEL, ("a", "b")),
        "jbn.tools.fold_variables: pairs is a sequence with 'a'. Expected pairs of a layer and a batch norm. "
        "For example [('block/Conv_0', 'block/BatchNorm_0')].",
    ),
    "pairs that are none": (
        lambda: fold_variables(ONE_MODEL, 3),
        f"jbn.tools.fold_variables: pairs is 3. {PAIRS_TEXT}",
    ),
    "a pair of numbers": (
        lambda: fold_variables(ONE_MODEL, [(1, 2)]),
        f"jbn.tools.fold_variables: pairs is a sequence with (1, 2). {PAIRS_TEXT}",
    ),
    "a number as a pair": (
        lambda: fold_variables(ONE_MODEL, [3]),
        f"jbn.tools.fold_variables: pairs is a sequence with 3. {PAIRS_TEXT}",
    ),
    "a call that is none": (
        lambda: fold_variables(ONE_MODEL, call=3, x=ONE_X),
        "jbn.tools.fold_variables: call is 3. Expected a function of variables and x. For example lambda "
        "variables, x: model.apply(variables, x, train=False).",
    ),
    "inside of jit": (
        lambda: jax.jit(functools.partial(fold_variables, pairs=[("a", "b")]))(ONE_MODEL),
        "jbn.tools.fold_variables: variables is one with a traced float32[1]. Expected values, which the "
        "proof needs. Call it outside of jit, grad and scan.",
    ),
    "an x inside of jit": (
        lambda: jax.jit(lambda x: fold_variables(ONE_MODEL, call=lambda variables, x: x, x=x))(ONE_X),
        "jbn.tools.fold_variables: x is one with a traced float32[1,1]. Expected values, which the proof "
        "needs. Call it outside of jit, grad and scan.",
    ),
    "an x of Python's numbers": (
        lambda: fold_variables(ONE_MODEL, call=lambda variables, x: x, x=[1.0, 2.0]),
        "jbn.tools.fold_variables: x is a tree with 1.0. Expected a tree of arrays. Convert it: jnp.asarray.",
    ),
    "another batch norm than the model itself": (
        lambda: fold_variables({"params": ONE, "batch_stats": ONE_STATS}, [("", "b")]),
        "jbn.tools.fold_variables: pairs is a sequence with the batch norm 'b'. Expected a batch norm of the "
        "model: the model itself. Paths are those of the variables; a shared NNX module has the first of its "
        "paths.",
    ),
    "a layer that is none": (
        lambda: fold_variables(ONE_MODEL, [("b", "b")]),
        "jbn.tools.fold_variables: pairs is a sequence with the layer 'b'. Expected a layer of the model: a. "
        "Paths are those of the variables; a shared NNX module has the first of its paths.",
    ),
    "a batch norm that is none": (
        lambda: fold_variables(ONE_MODEL, [("a", ("block", "b"))]),
        "jbn.tools.fold_variables: pairs is a sequence with the batch norm 'block/b'. Expected a batch norm "
        "of the model: b. Paths are those of the variables; a shared NNX module has the first of its paths.",
    ),
    "a model without layers": (
        lambda: fold_variables({"batch_stats": {"b": ONE_STATS}}, [("a", "b")]),
        "jbn.tools.fold_variables: pairs is a sequence with the layer 'a'. Expected a layer of the model: it "
        "has none. Paths are those of the variables; a shared NNX module has the first of its paths.",
    ),
    "a pair twice": (
        lambda: fold_variables(ONE_MODEL, [("a", "b"), ("a", "b")]),
        "jbn.tools.fold_variables: pairs is a sequence with a, b in several pairs. Expected each layer and "
        "each batch norm once. A layer takes one batch norm.",
    ),
    "stacked layers": (
        stacked_model,
        "jbn.tools.fold_variables 'ScanStep_0/Dense_0 -> ScanStep_0/BatchNorm_0': params['bias'] is "
        "float32[3,3]. Expected shape (3,), that of axis -1 of kernel = float32[3,3,3]. " + SIZE_FIX,
    ),
    "outputs that move": (
        lambda: fold_variables(
            ONE_MODEL,
            [("a", "b")],
            call=lambda variables, x: x * variables["params"]["a"]["kernel"],
            x=np.ones((1, 1), np.float32),
            epsilon=0.0,
        ),
        "jbn.tools.fold_variables: pairs is a sequence with a -> b, which moves outputs by 1.0e+00 of the "
        "largest. Expected at most 1.0e-05. " + MOVED_FIX,
    ),
    "values too large for their dtype": (
        lambda: out_of_range_of_float16(1e-12),
        "jbn.tools.fold_variables: pairs is a sequence with a -> b, which moves outputs by inf of the "
        "largest. Expected at most 3.9e-03. " + MOVED_FIX,
    ),
    "values too small for their dtype": (
        lambda: out_of_range_of_float16(1e18),
        "jbn.tools.fold_variables: pairs is a sequence with a -> b, which moves outputs by 1.0e+00 of the "
        "largest. Expected at most 3.9e-03. " + MOVED_FIX,
    ),
    **{
        f"outputs to prove by, of which none floats: {got}": (
            lambda end=end: with_outputs(end),
            f"jbn.tools.fold_variables: call is a function that returns {got}. Expected floating outputs, by "
            "which the proof sees a change. Return the logits, and not their argmax.",
        )
        for got, end in (("int32[4]", lambda y: y.argmax(-1)), ("nothing", lambda y: ()))
    },
    "a count of floats, by pairs": (
        lambda: fold_variables(with_stats(count=np.float32(1)), [("a", "b")]),
        "jbn.tools.fold_variables 'a -> b': batch_stats['count'] is float32[]. Expected an integer dtype. "
        "Averages are kept in float32, the number of updates in int32.",
    ),
}
