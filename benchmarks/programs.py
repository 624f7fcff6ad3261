"""What is compiled, counted and timed: a layer forward, and forward with backward."""

import jax
import jax.numpy as jnp


def forward(layer, **options):
    """(params, state, x) -> y, new state."""
    return lambda params, state, x: layer.apply(params, state, x, **options)


def with_gradients(layer, **options):
    """(params, state, x, dy) -> y, new state, gradients of params and x for the cotangent dy."""

    def run(params, state, x, dy):
        y, pullback, new = jax.vjp(lambda p, x: layer.apply(p, state, x, **options), params, x, has_aux=True)
        return y, new, pullback(dy)

    return run


def in_a_network(layer, **options):
    """As `with_gradients`, with a cotangent that depends on y as it does in a network.

    A cotangent that is there beforehand lets the two halves melt into one kernel.
    """

    def run(params, state, x, other):
        y, pullback, new = jax.vjp(lambda p, x: layer.apply(p, state, x, **options), params, x, has_aux=True)
        return y, new, pullback((y * other).astype(y.dtype))

    return run


def shapes(tree, sharding=None):
    """The arrays of a tree as shapes that can be compiled for."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a), sharding=sharding), tree
    )


PROGRAMS = {"forward": forward, "forward + backward": in_a_network}
