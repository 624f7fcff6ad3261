"""One train step in four settings: on one device, and on many by jit, shard_map or pmap.

Batch norm over many devices has to use the statistics of the whole batch, and the loss the mean over the
whole batch, also where padding leaves some devices fewer images than others. Then every way computes the same
numbers, up to rounding:

    loss = sum_i(mask_i * loss_i) / sum_i(mask_i),   i over all rows of all devices
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import ArrayTree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from batches import Batch

AXIS = "data"


class State(NamedTuple):
    """All that training changes, and so all that a checkpoint holds."""

    params: ArrayTree
    batch_stats: ArrayTree
    opt_state: ArrayTree


TrainStep = Callable[[State, Batch], tuple[State, jax.Array]]


def initial_state(
    model: nn.Module, optimizer: optax.GradientTransformation, seed: int, *inputs: np.ndarray
) -> State:
    """A new state of a net that is called with such inputs; without batch norm it has no `batch_stats`."""
    variables = model.init(jax.random.key(seed), *inputs, train=False)
    params = variables["params"]
    return State(params, variables.get("batch_stats", {}), optimizer.init(params))


def jit_step(model: nn.Module, optimizer: optax.GradientTransformation) -> TrainStep:
    """The step for a whole batch, on one device or sharded over many.

    With sharded arrays nothing else changes: a sum over the batch is a sum over all devices, and the compiler
    puts in the communication. So the model needs no `axis_name`.
    """

    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        loss, batch_stats, gradients = loss_and_gradients(model, state, batch)
        return updated(optimizer, state, batch_stats, gradients), loss

    return jax.jit(step, donate_argnums=0)


def shard_map_step(model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainStep:
    """The step as each device of a mesh sees it: its own rows; the model has `axis_name=AXIS`.

    The gradients need no psum. shard_map knows that the parameters are the same on every device (`P()`), so
    differentiating by them sums over devices already; a second sum would multiply them by their number.
    """

    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        loss, batch_stats, gradients = loss_and_gradients(model, state, batch, axis_name=AXIS)
        return updated(optimizer, state, batch_stats, gradients), jax.lax.psum(loss, AXIS)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=(P(), P()))
    return jax.jit(mapped, donate_argnums=0)


def pmap_step(model: nn.Module, optimizer: optax.GradientTransformation, devices: list) -> TrainStep:
    """The step of the oldest way: every array, the state too, has a leading axis with one entry per device.

    pmap does not know what is the same on every device, so each has the gradients of its own share of the
    loss and they are summed here. Summed, not averaged: the shares are divided by the global count already,
    whereas an average over devices would weigh the rows of a half-empty one more.
    """

    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        loss, batch_stats, gradients = loss_and_gradients(model, state, batch, axis_name=AXIS)
        loss, gradients = jax.lax.psum((loss, gradients), AXIS)
        return updated(optimizer, state, batch_stats, gradients), loss

    return jax.pmap(step, axis_name=AXIS, devices=devices, donate_argnums=0)


def loss_and_gradients(
    model: nn.Module, state: State, batch: Batch, *, axis_name: str | None = None
) -> tuple[jax.Array, ArrayTree, ArrayTree]:
    """This device's share of the loss (shares add up to the loss), the new running statistics, gradients."""

    def loss_share(params: ArrayTree) -> tuple[jax.Array, ArrayTree]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = model.apply(
            variables, batch.images, train=True, mask=batch.mask, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        count = jnp.sum(batch.mask, dtype=jnp.float32)
        if axis_name is not None:
            count = jax.lax.psum(count, axis_name)
        return jnp.sum(jnp.where(batch.mask, losses, 0.0)) / count, new["batch_stats"]

    (loss, batch_stats), gradients = jax.value_and_grad(loss_share, has_aux=True)(state.params)
    return loss, batch_stats, gradients


def updated(
    optimizer: optax.GradientTransformation, state: State, batch_stats: ArrayTree, gradients: ArrayTree
) -> State:
    """The state after one step of the optimizer."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), batch_stats, opt_state)


def count_correct(model: nn.Module) -> Callable[[State, Batch], jax.Array]:
    """How many images of a batch, sharded or not, the net gets right by its running statistics."""

    def count(state: State, batch: Batch) -> jax.Array:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = model.apply(variables, batch.images, train=False)
        return jnp.sum((jnp.argmax(logits, axis=-1) == batch.labels) & batch.mask)

    return jax.jit(count)


class Placement:
    """Where arrays lie: the state the same on every device, of a batch an equal part on each.

    Attributes:
      num_devices: devices of all processes together. Batches have to be a multiple of it.
    """

    def __init__(self, devices: list, *, stacked: bool) -> None:
        """`devices` of all processes; `stacked`: in pmap's form, with a leading axis over local devices."""
        self.num_devices = len(devices)
        self.mesh = jax.make_mesh(
            (len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
        )
        self._devices = devices
        self._stacked = stacked
        self._local_count = sum(d.process_index == jax.process_index() for d in devices)

    def put_state(self, state: ArrayTree) -> ArrayTree:
        """Copies a state of NumPy arrays to every device."""
        if self._stacked:
            stacked = jax.tree.map(lambda x: np.broadcast_to(x, (self._local_count, *x.shape)), state)
            return jax.pmap(lambda x: x, devices=self._devices)(stacked)
        return self.replicate(state)

    def get(self, tree: ArrayTree) -> ArrayTree:
        """NumPy arrays of a replicated tree, from this process's first device."""

        def first(x: jax.Array) -> np.ndarray:
            return np.asarray(x.addressable_data(0)).reshape(x.shape[1:] if self._stacked else x.shape)

        return jax.tree.map(first, tree)

    def put_batch(self, batch: Batch) -> Batch:
        """Sends this process's part of a training batch to its devices."""
        if self._stacked:
            return jax.tree.map(lambda x: x.reshape(self._local_count, -1, *x.shape[1:]), batch)
        return self.shard(batch)

    def replicate(self, tree: ArrayTree) -> ArrayTree:
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def shard(self, batch: Batch) -> Batch:
        sharding = NamedSharding(self.mesh, P(AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
