"""A layer that counts its updates, and batches of different sizes, for the tests of running statistics."""

import numpy as np

import jbn
from tests.support.cases import tolerance

TOLERANCE = tolerance(np.float32)
RNG = np.random.default_rng(0)
PARTS = [(RNG.standard_normal((n, 3)) * 2 + 5 + n).astype(np.float32) for n in (8, 2, 20, 5)]
ROWS = np.concatenate(PARTS)
PARAMS, BATCH_STATS = jbn.init(3, count=True)


def trained(door, parts, batch_stats=BATCH_STATS, **settings):
    for x in parts:
        _, batch_stats = door(PARAMS, batch_stats, x, **settings)
    return batch_stats
