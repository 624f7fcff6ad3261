"""Error texts in full of the functions that make, measure, merge, update and debias statistics."""

import jbn
import jbn.tools
from tests.error_texts.core import STATS, X

TEXTS = {
    "features as a flag": (
        lambda: jbn.init(True),
        "jbn.init: features is True. Expected an int or a tuple of ints. Usually x.shape[-1].",
    ),
    "parameters as integers": (
        lambda: jbn.init(3, param_dtype=int),
        "jbn.init: param_dtype is <class 'int'>. Expected a floating or complex dtype. Usually jnp.float32.",
    ),
    "features of text": (
        lambda: jbn.init("C"),
        "jbn.init: features is 'C'. Expected an int or a tuple of ints. Usually x.shape[-1].",
    ),
    "negative features": (
        lambda: jbn.init((3, -1)),
        "jbn.init: features is (3, -1). Expected an int or a tuple of ints. Usually x.shape[-1].",
    ),
    "moments of an unbound axis": (
        lambda: jbn.moments(X, axis_name="data"),
        "jbn.moments: axis_name is 'data', which nothing around the call binds. Expected a name"
        " bound by shard_map, pmap or vmap. Run the training step inside one of them with this "
        "axis name, or leave axis_name out: under jit, sharded arrays are synchronised without "
        "it.",
    ),
    "nothing to merge": (
        jbn.merge,
        "jbn.merge: moments is (). Expected one or more jbn.Moments of one shape. Merge the "
        "moments of one layer, as from jbn.moments(x).",
    ),
    "merging different layers": (
        lambda: jbn.merge(jbn.moments(X), jbn.moments(X, axis=1)),
        "jbn.merge: moments is (float32[3], float32[4]). Expected one or more jbn.Moments of "
        "one shape. Merge the moments of one layer, as from jbn.moments(x).",
    ),
    "merging what a checkpoint makes of moments": (
        lambda: jbn.merge(jbn.moments(X), {"count": 2, "mean": 0, "var": 1}),
        "jbn.merge: moments is (float32[3], {'count': 2, 'mean': 0, 'var': 1}). Expected one or more "
        "jbn.Moments of one shape. A checkpoint may give a mapping back: jbn.Moments(**found).",
    ),
    "update with another layer": (
        lambda: jbn.update(STATS, jbn.moments(X, axis=1)),
        "jbn.update: batch_stats['mean'] is float32[3]. Expected shape (4,). Make them for as many "
        "features as x has (jbn.init(features), num_features), or set axis to x's feature axis.",
    ),
    "update without statistics": (
        lambda: jbn.update(None, jbn.moments(X)),
        "jbn.update: batch_stats is None. Expected a dict or FrozenDict with mean, var, count, rows. "
        "See jbn.init.",
    ),
    "debias cumulative statistics": (
        lambda: jbn.tools.debias({"batch_stats": {"bn": jbn.init(3, count=True)[1]}}, momentum={"bn": None}),
        "jbn.tools.debias: momentum is None. Expected a number from 0 to 1, that of the layers. Cumulative "
        "statistics have nothing to debias: leave their layers out.",
    ),
}
