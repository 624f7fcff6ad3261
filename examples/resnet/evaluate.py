"""Tests a model that train.py or convert.py wrote: top-1 and top-5 accuracy, and how long an answer takes.

    python examples/resnet/evaluate.py --model runs/resnet/model.safetensors --data-dir imagenet/val

Latency is measured twice: as the model is, and with its batch norms folded into the convolutions.
"""

import functools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from chex import ArrayTree

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the examples share

import hosts
import jbn.tools
import parallel
from batches import num_batches
from errors import UsageError, one_line_errors
from resnet.data import CenterCrops, Pictures, evaluation_batches
from resnet.model import ResNet, load_model
from resnet.step import accuracy, make_evaluation_step

CALLS = 30  # of which the median is told


def main(
    model: Path,
    data_dir: Path,
    batch_size: int = 256,
    latency_batch: int = 1,
    threads: int = 4,
    broken: Literal["skip", "stop"] = "skip",
) -> tuple[float, float]:
    """Tests a model.

    Args:
      model: A model.safetensors.
      data_dir: A folder with one folder of pictures per class.
      batch_size: Pictures in a batch, over all devices.
      latency_batch: Pictures in a call whose time is measured, on one device.
      threads: Threads that decode pictures.
      broken: A picture that cannot be decoded is left out of the count with a warning, or ends the program.
    """
    for name, value in {"batch-size": batch_size, "latency-batch": latency_batch, "threads": threads}.items():
        if value < 1:
            raise UsageError(f"--{name} {value}: expected 1 or more")
    net, variables, about = load_model(model)
    pictures = Pictures(data_dir, broken=broken)
    if pictures.classes != about["classes"]:
        raise UsageError(f"{data_dir}: its class folders are not the classes of {model}")
    placement = parallel.Placement(hosts.choose_devices(None), stacked=False)
    crops = CenterCrops(pictures, about["image_size"], part=about["center_crop"])
    size = num_batches(batch_size, placement.num_devices) * placement.num_devices
    batches = evaluation_batches(crops, len(pictures), size, threads=threads)
    on_devices = placement.replicate(variables)
    top1, top5, count = accuracy(make_evaluation_step(net), on_devices, batches, placement)
    print(f"{count} pictures: top 1 {top1:.4f}, top 5 {top5:.4f}")
    images = np.zeros((latency_batch, about["image_size"], about["image_size"], 3), np.uint8)
    calls = {"as it is": serving(net, variables), "folded": serving(net, fold(net, variables))}
    for name, seconds in latencies(calls, images).items():
        print(f"{latency_batch} picture(s) in {1000 * seconds:.2f} ms, {name}")
    return top1, top5


def serving(net: ResNet, variables: ArrayTree) -> Callable[[jax.Array], jax.Array]:
    """Pictures to logits, compiled with the parameters as constants, as an exported program has them."""
    return jax.jit(functools.partial(net.apply, variables, train=False))


def fold(net: ResNet, variables: ArrayTree) -> ArrayTree:
    """The variables with every batch norm folded into the convolution before it.

    Each pair is proved by what the net returns: in float32, where small differences show.
    """
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    call = functools.partial(net.clone(dtype=np.float32).apply, train=False)
    return jbn.tools.fold_variables(variables, call=call, x=images)


def latencies(calls: Mapping[str, Callable[[jax.Array], jax.Array]], images: np.ndarray) -> dict[str, float]:
    """Seconds of each call, the median of many after the first, which compiles; called in turn."""
    found = {name: [] for name in calls}
    for _ in range(CALLS + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call(images))
            found[name].append(time.perf_counter() - started)
    return {name: float(np.median(seconds[1:])) for name, seconds in found.items()}


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
