"""What is compiled: one train step, for one device or the whole mesh, and one of evaluation.

    gradients, moments = sums over micro-batches of the batch
    if all gradients are finite: parameters, optimizer and statistics move, each once; else none of them does

A batch whose gradients are NaN or inf, from one overflow in bfloat16 or one bad picture, so costs a step and
no more: its statistics are as spoiled as its gradients.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import ArrayTree

import jbn
import jbn.tools
from batches import Batch
from errors import UsageError
from parallel import Placement
from resnet.model import ResNet
from resnet.options import Config


class State(NamedTuple):
    """All that training changes, and so all that a checkpoint holds. `average`: of params, or None."""

    step: jax.Array
    params: ArrayTree
    batch_stats: ArrayTree
    opt_state: optax.ApplyIfFiniteState
    average: ArrayTree | None


class Report(NamedTuple):
    """What a step tells: the mean loss, and the moments of its batch at each batch norm."""

    loss: jax.Array
    moments: ArrayTree


def make_optimizer(
    config: Config, variables: ArrayTree, steps_per_epoch: int, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer, which leaves all as it is where a gradient is not finite, and its learning rate."""
    peak = config.learning_rate * config.batch_size / 256
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total_steps)
    decays = jbn.tools.weight_decay_mask(variables)
    if config.optimizer == "lars":  # leaves all vectors out, as is usual: the bias of the last layer too
        adapts = jax.tree.map(lambda decays, x: decays and x.ndim > 1, decays, variables["params"])
        optimizer = optax.lars(
            schedule, config.weight_decay, weight_decay_mask=adapts, trust_ratio_mask=adapts, momentum=0.9
        )
    else:
        decay = optax.add_decayed_weights(config.weight_decay, decays)
        optimizer = optax.chain(decay, optax.sgd(schedule, momentum=0.9, nesterov=True))
    # Never gives up here: train.py stops a run that has had too many such steps in a row.
    return optax.apply_if_finite(optimizer, max_consecutive_errors=jnp.iinfo(jnp.int32).max), schedule


def renorm_limits(step: jax.Array, total_steps: int) -> jbn.Renorm:
    """From plain batch norm to the paper's limits, during the second tenth of training (arXiv 1702.03275)."""
    share = jnp.clip(step / (0.1 * total_steps) - 1.0, 0.0, 1.0).astype(jnp.float32)
    return jbn.Renorm(1.0 + 2.0 * share, 5.0 * share)


def make_train_step(
    model: ResNet, optimizer: optax.GradientTransformation, config: Config, total_steps: int
) -> Callable[[State, Batch], tuple[State, Report]]:
    """The step for a whole batch, on one device or sharded over many: then a sum is one over all devices."""

    def forward(params, batch_stats, moments, renorm, images, labels):
        """The mean loss of a micro-batch, whose moments are merged into those of the batch."""
        variables = {"params": params, "batch_stats": batch_stats} | moments
        collections = ["batch_stats", "batch_moments"]
        logits, new = model.apply(variables, images, train=True, renorm=renorm, mutable=collections)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, model.num_classes), config.label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, {"batch_moments": new["batch_moments"]}  # not the statistics after one part

    if config.checkpoint_policy:
        forward = jax.checkpoint(forward, policy=jbn.checkpoint_policy)

    def step(state: State, batch: Batch) -> tuple[State, Report]:
        renorm = renorm_limits(state.step, total_steps) if config.norm == "renorm" else None

        def add(carry, part):
            """One micro-batch."""
            loss, gradients, moments = carry
            found, slope = jax.value_and_grad(forward, has_aux=True)(
                state.params, state.batch_stats, moments, renorm, *part
            )
            return (loss + found[0], jax.tree.map(jnp.add, gradients, slope), found[1]), None

        parts = jax.tree.map(lambda rows: _micro_batches(rows, config.accumulate), batch[:2])
        _, like = jax.eval_shape(
            forward, state.params, state.batch_stats, {}, renorm, *jax.tree.map(lambda rows: rows[0], parts)
        )
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (jnp.float32(0), state.params, like))
        if config.accumulate == 1:  # no loop: on a CPU convolutions in loops take six times as long
            (loss, gradients, moments), _ = add(nothing, jax.tree.map(lambda rows: rows[0], parts))
        else:
            (loss, gradients, moments), _ = jax.lax.scan(add, nothing, parts)
        loss, gradients = jax.tree.map(lambda x: x / config.accumulate, (loss, gradients))
        return _updated(state, gradients, moments), Report(loss, moments)

    def _updated(state: State, gradients: ArrayTree, moments: ArrayTree) -> State:
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        variables = {"params": params, "batch_stats": state.batch_stats}
        new = jbn.tools.apply_moments(variables, moments, momentum=config.momentum)["batch_stats"]
        average = None if state.average is None else jbn.tools.ema(state.average, params, config.average)
        batch_stats, average = jax.tree.map(
            lambda new, old: jnp.where(opt_state.last_finite, new, old),
            (new, average),
            (state.batch_stats, state.average),
        )
        return State(state.step + 1, params, batch_stats, opt_state, average)

    return jax.jit(step, donate_argnums=0)


def _micro_batches(rows: jax.Array, count: int) -> jax.Array:
    """[N, ...] to [count, N / count, ...]: every count-th row, so that a device keeps the rows it has."""
    return jnp.moveaxis(rows.reshape(-1, count, *rows.shape[1:]), 1, 0)


def make_evaluation_step(model: ResNet) -> Callable[[ArrayTree, Batch], jax.Array]:
    """Of a batch, i32[3]: labels that are the first guess, among the first five, and that are there."""

    @jax.jit
    def count(variables: ArrayTree, batch: Batch) -> jax.Array:
        logits = model.apply(variables, batch.images, train=False)
        own = jnp.take_along_axis(logits, batch.labels[:, None], axis=-1)
        # Ties count against the net, and so does NaN: one whose logits are all the same knows nothing.
        rank = jnp.sum(~(logits < own), axis=-1) - 1
        found = jnp.stack([rank == 0, rank < 5, jnp.ones_like(batch.mask)])
        return jnp.sum(found & batch.mask, axis=-1)

    return count


def accuracy(
    count: Callable[[ArrayTree, Batch], jax.Array],
    variables: ArrayTree,
    batches: grain.DatasetIterator,
    placement: Placement,
    *,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[float, float, int]:
    """The parts of all pictures whose label is the net's first guess, and among its first five; how many.

    `before_each`: called before each batch; may raise to end it.
    """
    counts = np.zeros(3, np.int64)
    with contextlib.closing(batches):
        for batch in batches:
            before_each()
            counts += placement.get(count(variables, placement.shard(batch)))
    if counts[2] == 0:
        raise UsageError("none of the pictures to test on can be decoded")
    return float(counts[0] / counts[2]), float(counts[1] / counts[2]), int(counts[2])


def recalibrate(model: ResNet, variables: ArrayTree, batches: Iterable[Batch]) -> ArrayTree:
    """The variables with statistics of these training batches, as averaged weights need them."""

    def apply_fn(variables: ArrayTree, batch: Batch, **options: Any) -> Any:
        return model.apply(variables, batch.images, train=True, **options)

    return jbn.tools.recalibrate(apply_fn, variables, batches)
