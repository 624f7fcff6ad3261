"""One process of several, or one of many devices: takes its part of a batch, writes what it got to a file.

    python process_worker.py INPUTS OUTPUTS DEVICES [COORDINATOR PROCESSES INDEX SECONDS [STEPS]]

A process that has not been heard of for SECONDS is taken for dead. After STEPS steps the process leaves,
without a word to the others.
"""

import functools
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
import jbn.tools


def start(devices, coordinator=None, processes=1, index=0, seconds=0):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    if coordinator is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator,
            processes,
            index,
            initialization_timeout=120,
            heartbeat_timeout_seconds=seconds,
            shutdown_timeout_seconds=seconds,
        )
    assert jax.process_count() == processes
    assert jax.device_count() == devices * processes


def step(params, x, cotangent, mask, axis_name=None):
    """y, new statistics and gradients, by name."""

    def normalize(params, x):
        return jbn.batch_norm(
            params,
            jbn.init(x.shape[-1])[1],
            x,
            use_running_average=False,
            momentum=0.9,
            axis_name=axis_name,
            mask=mask,
        )

    y, pullback, new = jax.vjp(normalize, params, x, has_aux=True)
    d_params, dx = pullback(cotangent)
    return {"y": y, "dx": dx} | new | {f"d_{name}": value for name, value in d_params.items()}


SPLIT = {"y": P("data"), "dx": P("data")} | dict.fromkeys(("mean", "var", "d_scale", "d_bias"), P())


def summed(*arguments):
    result = step(*arguments, axis_name="data")
    return result | jax.lax.psum({name: result[name] for name in ("d_scale", "d_bias")}, "data")


def steps(mesh):
    """Each way to train on all devices, compiled."""
    split = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data"), P("data")), out_specs=SPLIT
    )
    whole = {name: NamedSharding(mesh, spec) for name, spec in SPLIT.items()}
    return {
        "shard_map": jax.jit(split(functools.partial(step, axis_name="data"))),
        "unchecked": jax.jit(split(summed, check_vma=False)),
        "jit": jax.jit(step, out_shardings=whole),
    }


def recalibrated(x, mask):
    """Population statistics of two batches, each of which all processes have a part of."""
    layer, (params, batch_stats) = jbn.linen.BatchNorm(use_running_average=False), jbn.init(x.shape[-1])

    def apply_fn(variables, batch, **options):
        return layer.apply(variables, batch[0], mask=batch[1], **options)

    variables = {"params": params, "batch_stats": batch_stats}
    batches = [(x, mask), (2 * x, mask)]
    return jbn.tools.recalibrate(apply_fn, variables, batches, tolerance=0.0)["batch_stats"]


def main(inputs, outputs, devices, coordinator=None, processes=1, index=0, seconds=0, last=-1):
    start(int(devices), coordinator, int(processes), int(index), int(seconds))
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    data = dict(np.load(inputs))
    params = {name: jnp.asarray(data[name]) for name in ("scale", "bias")}

    def place(array):
        """Reads this process's part alone."""
        sharding = NamedSharding(mesh, P("data"))
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    split = [place(data[name]) for name in ("x", "cotangent", "mask")]
    found = {}
    for done, (way, run) in enumerate(steps(mesh).items()):
        if done == int(last):
            os._exit(1)
        program = run.lower(params, *split).compile().as_text()
        found[f"{way} all-reduces"] = len(re.findall(r" all-reduce(?:-start)?\(", program))
        for name, value in run(params, *split).items():
            for shard in value.addressable_shards:
                at = shard.index[0].start or 0 if SPLIT[name] else 0
                found[f"{way} {name} {at} {shard.device.id}"] = np.asarray(shard.data)
    for name, value in recalibrated(*split[::2]).items():
        found[f"recalibrated {name} {index}"] = np.asarray(value)
    np.savez(outputs, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
