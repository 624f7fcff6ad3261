"""A policy for `jax.checkpoint`: what to keep of a model with batch norms."""

from typing import Any

import jax

from jbn._core.forward import X_NAME
from jbn._core.normalize import MOMENTS_NAME

_saves_names = jax.checkpoint_policies.save_only_these_names(X_NAME, MOMENTS_NAME)


def checkpoint_policy(primitive: Any, *arrays: Any, **params: Any) -> Any:
    """A policy of `jax.checkpoint`, `nn.remat` and `nnx.remat` that keeps the inputs of batch norms.

        loss = jax.checkpoint(loss, policy=jbn.checkpoint_policy)
        Block = nn.remat(Block, policy=jbn.checkpoint_policy)

    The backward pass then computes everything else in the region again, but measures no batch again: of a
    batch norm only the affine and the activation are repeated, no reduction over rows, no collective. Each
    batch norm keeps x, which the layer before has made, and one value per channel; y, which the next layer
    would keep otherwise, is made of them. Around a whole network of convolution, batch norm and relu that
    is about half the memory, for one more read and one more write of each x. Values, gradients and running
    statistics stay the same. In evaluation x is kept too.

    What goes into a region is kept as well: put it around several layers. In a network of residual blocks put
    one around each run of blocks of one size. In one region around them all, each block's output is made of
    the one before, so all of them are there at once.

    It saves what bears one of two names, for policies of your own: "jbn_x", x as the batch norm received it,
    and "jbn_moments", what it measured, over all devices.

    Args:
      primitive: JAX calls the policy, with each operation,
      *arrays: its inputs
      **params: and its parameters.

    Returns:
      Whether the outputs of the operation are saved.

    Example:
      >>> import jax, jax.numpy as jnp, jbn
      >>> params, batch_stats = jbn.init(2)
      >>> def loss(x):
      ...     y, _ = jbn.batch_norm(params, batch_stats, jnp.sin(x), use_running_average=False)
      ...     return jnp.sum(jnp.cos(y))
      >>> x = jnp.arange(8.0).reshape(4, 2)
      >>> remat = jax.checkpoint(loss, policy=jbn.checkpoint_policy)
      >>> print(jnp.allclose(jax.grad(remat)(x), jax.grad(loss)(x), atol=1e-6))
      True

    Reference: Chen et al. 2016, Training deep nets with sublinear memory cost, arXiv 1604.06174; Rota Bulo
    et al. 2018, In-place activated batch norm, arXiv 1712.02616.
    """
    return _saves_names(primitive, *arrays, **params)
