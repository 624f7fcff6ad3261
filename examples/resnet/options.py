"""The options of train.py: a typed configuration that is its command line too."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from errors import UsageError


@dataclasses.dataclass(frozen=True)
class Config:
    """Options. The defaults are the usual recipe for ImageNet: ResNet-50, 90 epochs of SGD."""

    data_dir: Path
    """Folder with train/ and val/, each with one folder of JPEG or PNG files per class."""
    output: Path = Path("runs/resnet")
    """Folder of checkpoints, metrics.csv, curves.png, norms.csv and model.safetensors."""

    depth: Literal[18, 34, 50, 101] = 50
    """Layers of the ResNet."""
    width: int = 64
    """Channels of its first stage."""
    small_images: bool = False
    """Begin with a 3x3 convolution of stride 1 and no pooling, as on CIFAR."""
    norm: Literal["sync", "ghost", "renorm"] = "sync"
    """Statistics of the whole batch; of groups of --ghost-size images; or batch renormalization."""
    ghost_size: int = 32
    """Images that are normalized together, with --norm ghost."""
    momentum: float = 0.9
    """Of batch norm's running statistics: the weight of the old ones."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations. Parameters and statistics are float32."""

    epochs: int = 90
    """How often to go through the data."""
    max_steps: int | None = None
    """Stop after so many steps, if the epochs are not over."""
    batch_size: int = 256
    """Images in a step, over all devices and hosts."""
    accumulate: int = 1
    """Cut each batch into so many micro-batches, for when it does not fit: one update of everything."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """SGD with momentum, or LARS for batches of thousands."""
    learning_rate: float = 0.1
    """The peak, for 256 images in a step; proportional to --batch-size."""
    warmup_epochs: float = 5.0
    """From 0 to the peak, for half of the run at most; a cosine to 0 follows."""
    weight_decay: float = 1e-4
    """Of all but batch norm's scale and bias."""
    label_smoothing: float = 0.1
    """The part of a label that is spread over all classes."""
    average: float | None = None
    """Decay of an average of the weights, such as 0.9999. The final model is then the average."""
    recalibrate_batches: int = 100
    """Training batches on which the statistics of that average are measured in the end."""
    checkpoint_policy: bool = False
    """Keep of each batch norm its input alone for the backward pass: about half the memory of activations."""

    image_size: int = 224
    """Pixels of the square that the net sees."""
    crop_scale: float = 0.08
    """A random crop has at least this part of the picture's area; 1 for the whole picture."""
    flip: bool = True
    """Mirror half of the training pictures."""
    center_crop: float = 0.875
    """The part of the shorter side that is seen in evaluation."""
    broken: Literal["skip", "stop"] = "skip"
    """A picture that cannot be decoded is skipped with a warning, or stops the run."""
    workers: int = 0
    """Processes that decode pictures; 0: threads of this one, which is enough for a few devices."""
    threads: int = 4
    """Threads that decode, with --workers 0; each process of --workers is one."""
    seed: int = 0
    """Of the initial parameters, and of the order and the crops of the data."""

    log_every: int = 10
    """Steps between rows of metrics.csv, each of which waits for the device."""
    checkpoint_every: int = 1000
    """Steps between checkpoints, besides those at the end of each epoch."""
    resume: bool = False
    """Go on with the run in the output folder, or begin one where it holds no checkpoint."""
    tensorboard: bool = False
    """Write for TensorBoard too, in tensorboard/ of the output folder."""
    devices: int | None = None
    """Devices of each process (default: all). A CPU can be any number of them."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for several processes where no cluster announces itself."""
    num_processes: int | None = None
    """How many processes, with --coordinator."""
    process_id: int | None = None
    """Which of them this is, from 0, with --coordinator."""


# What may differ between a run and its continuation. Not --workers: each has a part of the data's state.
NOT_SETTINGS = ("data_dir", "output", "resume", "tensorboard", "threads", "broken")
NOT_SETTINGS += ("log_every", "checkpoint_every", "devices", "coordinator", "num_processes", "process_id")

POSITIVE = ("width", "ghost_size", "epochs", "max_steps", "batch_size", "accumulate", "recalibrate_batches")
POSITIVE += ("image_size", "threads", "log_every", "checkpoint_every", "devices")
FRACTIONS = ("momentum", "label_smoothing", "average", "crop_scale", "center_crop")
NOT_NEGATIVE = ("seed", "workers", "learning_rate", "warmup_epochs", "weight_decay")


def check(config: Config) -> None:
    """Raises UsageError for a number out of range; names the option."""

    def refuse(names: tuple[str, ...], is_wrong: Any, expected: str) -> None:
        for name in names:
            value = getattr(config, name)
            if value is not None and is_wrong(value):
                raise UsageError(f"--{name.replace('_', '-')} {value}: expected {expected}")

    refuse(POSITIVE, lambda value: value < 1, "1 or more")
    refuse(FRACTIONS, lambda value: not 0 <= value <= 1, "0 to 1")
    refuse(("crop_scale", "center_crop"), lambda value: value == 0, "more than 0")
    refuse(NOT_NEGATIVE, lambda value: value < 0, "0 or more")


def settings(config: Config) -> dict[str, Any]:
    """What decides the numbers, and so has to be the same when a run is resumed."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_SETTINGS}


def model_attributes(config: Config, num_classes: int) -> dict[str, Any]:
    """Those of the net, as its file has them."""
    return {
        "depth": config.depth,
        "num_classes": num_classes,
        "width": config.width,
        "small_images": config.small_images,
        "momentum": config.momentum,
        "virtual_batch_size": config.ghost_size if config.norm == "ghost" else None,
        "dtype": config.dtype,
    }
