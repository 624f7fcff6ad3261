"""The functions that are the batch norm: `init` and `batch_norm`."""

from collections.abc import Sequence
from typing import Literal, overload

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jbn._core.arguments import Stats, check_param_dtype, prepare_flag, prepare_x
from jbn._core.errors import error, public
from jbn._core.forward import apply
from jbn._core.moments import Moments
from jbn._core.options import Options, check_static
from jbn._core.renorm import Renorm
from jbn._core.types import ActivationLike, Axes, AxisIndexGroups, AxisName, Dtype, Flag, Params, X


@public
def init(
    features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    param_dtype: Dtype = jnp.float32,
    count: bool = False,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Parameters and running statistics of a new batch norm: it starts as the identity.

    They are the dicts that Flax keeps, so those of a Flax model can be passed to `batch_norm` as they are.

    Args:
      features: the number of channels, usually x.shape[-1], or a tuple of the sizes of several feature axes.
      use_scale: whether there is a scale (gamma).
      use_bias: whether there is a bias (beta).
      param_dtype: of scale and bias. Statistics are float32: in bfloat16 a running mean of 100 would never
        reach 101.
      count: whether batch_stats also keeps `count`, i32[], the number of updates, and `rows`, f32[C], the
        rows (or weights) seen.

    Returns:
      params with `scale` (ones) and `bias` (zeros), and batch_stats with `mean` (zeros) and `var` (ones),
      all of shape [C].

    Raises:
      ValueError: features that are not sizes.

    Example:
      >>> import jbn
      >>> params, batch_stats = jbn.init(2)
      >>> print(params["scale"], batch_stats["mean"])
      [1. 1.] [0. 0.]

    Reference: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """
    shape = tuple(features) if isinstance(features, Sequence) else (features,)
    if not shape or not all(
        type(n) is not bool and isinstance(n, (int, np.integer)) and n >= 0 for n in shape
    ):
        raise error("features", repr(features), "an int or a tuple of ints", "Usually x.shape[-1].")
    check_param_dtype(param_dtype)
    params = {}
    if use_scale:
        params["scale"] = jnp.ones(shape, param_dtype)
    if use_bias:
        params["bias"] = jnp.zeros(shape, param_dtype)
    batch_stats = {"mean": jnp.zeros(shape, jnp.float32), "var": jnp.ones(shape, jnp.float32)}
    if count:
        batch_stats |= {"count": jnp.zeros((), jnp.int32), "rows": jnp.zeros(shape, jnp.float32)}
    return params, batch_stats


@overload
def batch_norm(
    params: Params | None,
    batch_stats: Stats,
    x: X,
    *,
    use_running_average: Flag,
    axis: Axes = ...,
    momentum: float | Array | None = ...,
    epsilon: float = ...,
    axis_name: AxisName | None = ...,
    axis_index_groups: AxisIndexGroups | None = ...,
    mask: Array | None = ...,
    unbiased: bool = ...,
    debias: bool = ...,
    skip_nonfinite: bool = ...,
    virtual_batch_size: int | None = ...,
    renorm: Renorm | None = ...,
    activation: ActivationLike | None = ...,
    residual: Array | None = ...,
    dtype: Dtype | None = ...,
    blend: float | Array | None = ...,
    return_moments: Literal[False] = ...,
) -> tuple[Array, Stats]: ...


@overload
def batch_norm(
    params: Params | None,
    batch_stats: Stats,
    x: X,
    *,
    use_running_average: Flag,
    axis: Axes = ...,
    momentum: float | Array | None = ...,
    epsilon: float = ...,
    axis_name: AxisName | None = ...,
    axis_index_groups: AxisIndexGroups | None = ...,
    mask: Array | None = ...,
    unbiased: bool = ...,
    debias: bool = ...,
    skip_nonfinite: bool = ...,
    virtual_batch_size: int | None = ...,
    renorm: Renorm | None = ...,
    activation: ActivationLike | None = ...,
    residual: Array | None = ...,
    dtype: Dtype | None = ...,
    blend: float | Array | None = ...,
    return_moments: Literal[True],
) -> tuple[Array, Stats, Moments]: ...


@public
def batch_norm(
    params: Params | None,
    batch_stats: Stats,
    x: X,
    *,
    use_running_average: Flag,
    axis: Axes = -1,
    momentum: float | Array | None = 0.99,
    epsilon: float = 1e-5,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    mask: Array | None = None,
    unbiased: bool = False,
    debias: bool = False,
    skip_nonfinite: bool = False,
    virtual_batch_size: int | None = None,
    renorm: Renorm | None = None,
    activation: ActivationLike | None = None,
    residual: Array | None = None,
    dtype: Dtype | None = None,
    blend: float | Array | None = None,
    return_moments: bool = False,
) -> tuple[Array, Stats] | tuple[Array, Stats, Moments]:
    """Normalizes x per channel, and returns it with the new running statistics.

        mean = E[x],  var = E[|x - mean|^2],  y = scale * (x - mean) / sqrt(var + epsilon) + bias

    In training the expectations are over every axis but the feature axes, and over the devices of
    `axis_name`; in evaluation mean and var are the running statistics, and nothing is updated.

    - Statistics are reduced in float32 or wider, about a shift near the data, whatever the dtype of x.
    - y is normalized by the biased variance, which is stored too unless `unbiased`.
    - Gradients, of any order, flow to x, scale, bias and residual; none through the returned statistics.
    - A channel with no row in this batch, or with one, is not updated; y is then bias.

    Args:
      params: a mapping with `scale` and `bias`, one of them or none; None is none. Each is [C], or has x's
        rank and broadcasts to x (conditional batch norm, arXiv 1707.00683).
      batch_stats: a mapping with `mean` and `var`, each [C], from `init`. None keeps none: x is then
        normalized by its batch in every mode.
      x: any shape of at least one axis; floating or complex (integers are taken as float32).
      use_running_average: True in evaluation, False in training; a traced bool works too.
      axis: the feature axis or axes.
      epsilon: added to the variance.

      How statistics are measured:
      axis_name: the mapped axis or axes (of `vmap`, `pmap` or `shard_map`) over which the batch is cut.
        Needed in training only. Under `jit`, sharded arrays need none.
      axis_index_groups: groups of devices of that axis that normalize together.
      mask: bool, or weights from 0 up: x's rank and broadcastable to x, or aligned with x's leading
        non-feature axes (`[N]`, `[N, T]`). Entries with 0 or False take no part in statistics or
        gradients, whatever they hold.
      virtual_batch_size: ghost batch norm (Hoffer et al. 2017, arXiv 1705.08741): each group of so many
        successive examples, along the first axis that is no feature axis, is normalized by itself. Groups
        stay on their device; the running statistics are updated once, by all rows of all devices together.
      renorm: batch renormalization towards the running statistics, `jbn.Renorm(r_max, d_max)` (Ioffe 2017,
        arXiv 1702.03275). With virtual_batch_size each group is renormalized by itself.
      blend: None, or a number or scalar array from 0 to 1: evaluation normalizes by the mean
        `blend * running + (1 - blend) * batch`, and by the same mix of the variances (test-time adaptation:
        Schneider et al. 2020, arXiv 2006.16971). Nothing is stored; gradients flow through the batch's
        part; mask and axis_name work as in training. A channel with no row is normalized by its running
        statistics alone.

      How they are remembered:
      momentum: weighs the OLD statistics, `new = momentum * old + (1 - momentum) * batch`; from 0 to 1,
        or a traced scalar. PyTorch's 0.1 is 0.9 here. None is cumulative: the statistics of all rows so far,
        pooled by count as in `jbn.merge`; needs `rows`, from `init(..., count=True)`.
      unbiased: whether the variance that is stored is multiplied by n / (n - 1), as in PyTorch; n counts the
        rows of all devices that take part.
      debias: whether evaluation (and renorm) divides out what is left of the initial 0 and 1:
        `mean / (1 - momentum^count)`, `(var - momentum^count) / (1 - momentum^count)` (Kingma and Ba 2014,
        arXiv 1412.6980, section 3). After one update it uses that batch's statistics; the rounding error
        of the stored ones is divided by 1 - momentum. Needs `count`.
      skip_nonfinite: whether a batch whose statistics hold NaN or inf in any channel updates nothing, on all
        devices that normalize together.

      What happens after:
      residual: added to y; x's rank, and broadcasts to x. It is cast to y's dtype, and not masked: it is
        added where x is masked too.
      activation: "relu", or any function of each entry of a real array, such as `jax.nn.silu` or
        `functools.partial(jax.nn.leaky_relu, negative_slope=0.1)`: gives `activation(y + residual)`, with the
        values and gradients of the separate operations. The backward pass keeps x and computes y again;
        with a residual it keeps that too, and for relu y instead. A function with a `custom_vjp` is applied
        to y. The function is a static argument, compared by identity (a `functools.partial` by what it
        holds): define it once, or outside of jit each new one is compiled. `jax.nn.gelu` is computed as
        y logistic(2 u), which equals y (1 + tanh(u)) / 2.
      dtype: of y; None: x's.
      return_moments: whether the moments of the batch are returned too, in training and in evaluation: over
        all devices, and without masked entries. Training measures them in any case. Differentiable.

    Returns:
      y, of x's shape, and the new batch_stats, with the structure, shapes and dtypes of the given ones; with
      return_moments also the batch's `jbn.Moments`.

    Raises:
      ValueError: an argument that does not fit, or does not go with another; one value per channel in
        training.
      NameError: an axis name that nothing binds, in training.

    Example:
      >>> import jax.numpy as jnp, jbn
      >>> params, batch_stats = jbn.init(1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, batch_stats = jbn.batch_norm(params, batch_stats, x, use_running_average=False, momentum=0.9)
      >>> print(y[:, 0].round(3), batch_stats["mean"], batch_stats["var"])
      [-1.  1.] [0.2] [1.]

    Reference: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """
    options = Options(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
        debias=debias,
        skip_nonfinite=skip_nonfinite,
        virtual_batch_size=virtual_batch_size,
        renorm=renorm,
        blend=blend,
        activation=activation,
    )
    check_static("return_moments", return_moments)
    x, axes = prepare_x(x, axis)
    y, new_stats, moments = apply(
        x,
        axes,
        params,
        batch_stats,
        prepare_flag(use_running_average),
        options,
        mask=mask,
        residual=residual,
        dtype=dtype,
        with_moments=return_moments,
    )
    if moments is None or not return_moments:
        return y, new_stats
    return y, new_stats, moments
