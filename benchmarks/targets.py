"""Compiling for machines that are not there: an H100, and slices of TPU v5e.

    pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt    (of JAX's version)
    pip install --no-deps nvidia-cuda-nvcc nvidia-nvvm         (where there is no CUDA toolkit)
    pip install libtpu

The process must have been started with `benchmarks.processes.AHEAD`.
"""

import importlib.util
import unittest.mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import hlo

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 13 }
"""
NEEDS = {"H100": "jax_cuda13_plugin", "TPU v5e": "libtpu"}


def missing(target):
    """Why a target cannot be compiled for, or None."""
    if importlib.util.find_spec(NEEDS[target]) is None:
        return f"{NEEDS[target].replace('_', '-')} is not installed"
    return None


def mesh(target, devices=1):
    """A mesh of so many devices of the target, with the axis "data"."""
    if target == "CPU":
        found = jax.devices("cpu")
    elif target == "H100":
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=H100, topology="1x1x1"
        ).devices
    else:
        name = {1: "2x2", 8: "2x4", 256: "16x16"}[devices]
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"v5e:{name}").devices
    return Mesh(np.array(found[:devices]), ("data",), axis_types=(AxisType.Auto,))


def place(target):
    """One device of the target, as a sharding."""
    return NamedSharding(mesh(target), PartitionSpec())


def compiled(function, arguments, target, **options):
    """The program for a target; for a TPU without branches that are not taken, which XLA's estimate counts.

    That is jbn's second pass where the running mean is far off. Of an H100's program `hlo.moved` leaves
    branches out itself.
    """
    if target == "H100":
        return jax.jit(function, **options).lower(*arguments).compile()
    with unittest.mock.patch("jax.lax.cond", lambda predicate, taken, other, *operands: taken(*operands)):
        return jax.jit(function, **options).lower(*arguments).compile()


def moved(compiled, target, library=True):
    """Bytes that a compiled program reads and writes; on a TPU by XLA's own estimate, which has it all."""
    if target == "H100":
        return hlo.moved(compiled.as_text(), library)
    return (compiled.cost_analysis() or {}).get("bytes accessed", 0)


def temporary(compiled):
    """Bytes of temporary memory at the peak."""
    return compiled.memory_analysis().temp_size_in_bytes
