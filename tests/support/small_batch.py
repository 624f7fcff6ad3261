"""One small batch and its layer, with short ways in: shared by the tests of state and of transforms."""

import numpy as np
import pytest

import jbn
import jbn.linen
from tests.support import doors
from tests.support.cases import tolerance

TOLERANCE = tolerance(np.float32)
PARAMS, BATCH_STATS = jbn.init(3)
X = (np.random.default_rng(0).standard_normal((8, 3)) * 2 + 1).astype(np.float32)
MASK = np.arange(8) < 5
COTANGENT = np.random.default_rng(1).standard_normal((8, 3)).astype(np.float32)


def core(batch_stats, x, flag=False, params=None, **settings):
    return doors.core(params or {}, batch_stats, x, flag, **settings)


def linen(batch_stats, x, flag=False, params=None, **settings):
    return doors.linen(params or {}, batch_stats, x, flag, **settings)


both = pytest.mark.parametrize("door", [core, linen])


def layer(**settings):
    return jbn.linen.BatchNorm(momentum=0.9, **settings)
