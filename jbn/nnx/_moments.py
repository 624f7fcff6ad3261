"""The variable in which a layer leaves the moments of its batches."""

from flax import nnx

from jbn._core.moments import Moments


class BatchMoments(nnx.BatchStat[Moments]):
    """The moments of a layer's batches: the counterpart of linen's collection `batch_moments`.

    As a filter it selects these alone. `nnx.BatchStat`, its base class, selects all statistics.

    Example:
      >>> import jbn.nnx
      >>> from flax import nnx
      >>> layer = jbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> jbn.nnx.keep_batch_moments(layer)
      >>> list(nnx.to_pure_dict(nnx.state(layer, jbn.nnx.BatchMoments)))
      ['batch_moments']
    """
