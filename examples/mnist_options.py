"""The options of mnist.py: a typed configuration that is its command line too."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from errors import UsageError
from idx import MNIST


@dataclasses.dataclass(frozen=True)
class Config:
    """Options. Those that are None depend on the model (`PRESETS`)."""

    model: Literal["cnn", "mlp"] = "cnn"
    """cnn: three convolutions; mlp: two hidden layers."""
    epochs: int | None = None
    """How often to go through the data (cnn: 4)."""
    max_steps: int | None = None
    """Stop after so many steps, if the epochs are not over (mlp: 1000)."""
    batch_size: int = 128
    """Images in a step, over all devices and hosts."""
    learning_rate: float | None = None
    """Adam's, at its peak (cnn: 0.004, one cycle; mlp: 0.001, constant)."""
    weight_decay: float | None = None
    """Of kernels only; batch norm's scale and bias and the biases have none (cnn: 0.01; mlp: 0)."""
    momentum: float = 0.9
    """Of batch norm's running statistics: the weight of the old ones."""
    seed: int = 0
    """Of the initial parameters and of the order of the data."""
    train_size: int | None = None
    """Use only the first so many training images."""
    data_dir: Path = MNIST
    """Four IDX files with MNIST's names, gzipped or not."""
    output: Path = Path("runs/mnist")
    """Folder of checkpoints, metrics.csv and curves.png."""
    resume: bool = False
    """Go on with the run in the output folder."""
    devices: int | None = None
    """Devices of each process (default: all). A CPU can be any number of them."""
    parallel: Literal["jit", "shard_map", "pmap"] = "jit"
    """How to use many devices."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for several processes where no cluster announces itself."""
    num_processes: int | None = None
    """How many processes, with --coordinator."""
    process_id: int | None = None
    """Which of them this is, from 0, with --coordinator."""


PRESETS = {
    "cnn": {"epochs": 4, "max_steps": None, "learning_rate": 4e-3, "weight_decay": 1e-2},
    "mlp": {"epochs": None, "max_steps": 1000, "learning_rate": 1e-3, "weight_decay": 0.0},
}
# What may differ between a run and its continuation.
NOT_SETTINGS = ("data_dir", "output", "resume", "devices", "parallel")
NOT_SETTINGS += ("coordinator", "num_processes", "process_id")


def with_preset(config: Config) -> Config:
    """Fills in what depends on the model, and checks the numbers."""
    preset = dict(PRESETS[config.model])
    if config.epochs is not None:
        preset["max_steps"] = None  # of the two ways to say how long, the user chose
    given = {name: getattr(config, name) for name in preset}
    chosen = {name: preset[name] if value is None else value for name, value in given.items()}
    config = dataclasses.replace(config, **chosen)
    for name in ("epochs", "max_steps", "batch_size", "train_size", "devices"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    if config.seed < 0:
        raise UsageError(f"--seed {config.seed}: expected 0 or more")
    if not 0 <= config.momentum <= 1:
        raise UsageError(f"--momentum {config.momentum}: expected 0 to 1, the weight of the old statistics")
    return config


def settings(config: Config) -> dict[str, Any]:
    """What decides the numbers, and so has to be the same when a run is resumed."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_SETTINGS}
