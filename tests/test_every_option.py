"""All options at once, at random: the right answer, or an error of ours; anything else is a fault."""

import os

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import jbn
from tests import naive, reference
from tests.cases import assert_close, loosely, tolerance
from tests.doors import DOORS

EXAMPLES = int(os.environ.get("JBN_EXAMPLES", "40"))
EPSILON = 1e-3

OPTIONS = {
    "momentum": st.sampled_from([0.0, 0.5, 0.99, 1.0, None]),
    "unbiased": st.booleans(),
    "debias": st.booleans(),
    "skip_nonfinite": st.booleans(),
    "virtual_batch_size": st.sampled_from([None, 1, 2, 3, 4, 8]),
    "renorm": st.sampled_from([None, jbn.Renorm(1.0, 0.0), jbn.Renorm(1.5, 0.5), jbn.Renorm(np.inf, np.inf)]),
    "activation": st.sampled_from([None, "relu"]),
}
LAYOUTS = [((8, 3), -1), ((8, 3), 1), ((3, 8), 0), ((8, 2, 3), -1), ((8, 3, 2, 2), 1), ((4, 3, 2, 2), (1, 3))]
MASKS = [None, "examples", "entries", "channels", "weights", "none", "one"]


@st.composite
def calls(draw):
    shape, axis = draw(st.sampled_from(LAYOUTS))
    return {
        "shape": shape,
        "axis": axis,
        "dtype": draw(st.sampled_from([np.float32, np.float32, jnp.bfloat16, np.float16])),
        "mask": draw(st.sampled_from(MASKS)),
        "params": draw(st.sampled_from([(), ("scale",), ("bias",), ("scale", "bias")])),
        "residual": draw(st.booleans()),
        "steps": draw(st.integers(0, 3)),
        "poison": draw(st.booleans()),
        "mode": draw(st.sampled_from(["train", "evaluate", "traced train", "traced evaluate"])),
        "door": draw(st.sampled_from(list(DOORS))),
        "seed": draw(st.integers(0, 99)),
        "options": {name: draw(strategy) for name, strategy in OPTIONS.items()},
    }


def mask_of(kind, shape, axis, rng):
    features = {a % len(shape) for a in np.atleast_1d(axis)}
    batch = min(a for a in range(len(shape)) if a not in features)
    entries = np.arange(np.prod(shape)).reshape(shape)
    return {
        None: lambda: None,
        "examples": lambda: rng.random(shape[batch]) < 0.7,
        "entries": lambda: rng.random(shape) < 0.7,
        "channels": lambda: (
            rng.random([n if a in (batch, *features) else 1 for a, n in enumerate(shape)]) < 0.7
        ),
        "weights": lambda: (rng.integers(0, 3, shape[batch]) * rng.uniform(0.5, 1.5, shape[batch])).astype(
            np.float32
        ),
        "none": lambda: np.zeros(shape, bool),
        "one": lambda: entries == 0,
    }[kind]()


def batch_stats_after(steps, features, momentum, rng):
    """As training leaves them: count, rows and a mean and var that may be debiased."""
    count, rows = np.int32(steps), np.full(features, 10.0 * steps, np.float32)
    share = 1.0 if not steps else (0.0 if momentum is None else momentum**steps)
    mean, var = rng.standard_normal(features), rng.uniform(0.5, 2, features)
    stats = {"mean": (1 - share) * mean, "var": share + (1 - share) * var}
    return {name: value.astype(np.float32) for name, value in stats.items()} | {"count": count, "rows": rows}


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES <= 40)
@given(calls())
def test_the_right_answer_or_an_error_of_ours(call):
    rng = np.random.default_rng(call["seed"])
    shape, axis, options = call["shape"], call["axis"], dict(call["options"])
    features = tuple(shape[a] for a in sorted(b % len(shape) for b in np.atleast_1d(axis)))
    x = (rng.standard_normal(shape) * 2 + 1).astype(call["dtype"])
    mask = mask_of(call["mask"], shape, axis, rng)
    weights = None if mask is None else reference.full_weights(x, axis, mask)
    if call["poison"] and mask is not None:
        x = np.where(weights > 0, x, np.asarray(np.nan, x.dtype))
    values = {"scale": rng.uniform(0.5, 1.5, features), "bias": rng.standard_normal(features)}
    params = {name: values[name].astype(np.float32) for name in call["params"]}
    residual = rng.standard_normal(shape).astype(call["dtype"]) if call["residual"] else None
    cotangent = rng.standard_normal(shape).astype(call["dtype"])
    stats = batch_stats_after(call["steps"], features, options["momentum"], rng)
    door = DOORS[call["door"] if np.ndim(axis) == 0 else "core"]
    if options["momentum"] is not None and not options["debias"] and door is not DOORS["core"]:
        stats = {name: stats[name] for name in ("mean", "var")}
    evaluating = call["mode"].endswith("evaluate")

    def ours(flag):
        def normalize(params, x, residual):
            extra = {"residual": residual} | ({} if mask is None else {"mask": mask})
            extra |= {"dtype": call["dtype"]}  # of y, where a layer would promote
            settings = options | {"axis": axis, "epsilon": EPSILON} | extra
            return door(params, stats, x, flag, **settings)

        y, pullback, new = jax.vjp(normalize, params, x, residual, has_aux=True)
        return y, new, pullback(cotangent)

    def theirs(params, x, residual):
        return naive.batch_norm(
            params,
            wide(stats),
            x,
            residual,
            axis=axis,
            weights=weights,
            epsilon=EPSILON,
            options=options,
            evaluating=evaluating,
        )

    try:
        if call["mode"].startswith("traced"):
            y, new, gradients = jax.jit(ours)(evaluating)
        else:
            y, new, gradients = ours(evaluating)
    except ValueError as error:
        assert str(error).startswith("jbn."), error  # noqa: PT017 - which one, texts_options.py says
        return
    clean = np.where(np.isfinite(x), x, np.zeros_like(x))
    with jax.enable_x64(True), loosely():
        expected, pullback, new_expected = jax.vjp(theirs, *wide((params, clean, residual)), has_aux=True)
        gradients_expected = pullback(jnp.asarray(wide(cotangent)))
    assert y.dtype == call["dtype"]
    tol = 4 * tolerance(call["dtype"])
    used = None if weights is None else weights > 0
    assert_close(y, expected, tol, where=used)
    assert np.isfinite(np.asarray(y, np.float32)).all()
    for name in stats:
        assert_close(new[name], np.asarray(new_expected[name]), 4 * tolerance(np.float32))
    if call["dtype"] == np.float32:  # in low precision relu may decide otherwise where y is about 0
        for one, other in zip(*map(jax.tree.leaves, (gradients, gradients_expected)), strict=True):
            assert_close(one, np.asarray(other), 10 * tol)
