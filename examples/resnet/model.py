"""ResNet-18, 34, 50 and 101 (v1.5) in linen, with relu and the residual inside the batch norms; its file.

Modules have the names of the ResNet in Flax's ImageNet example, and padding is torchvision's, so that the
weights of torchvision compute the same here (convert.py).

Reference: He et al. 2015, arXiv 1512.03385; the stride of a bottleneck is in its 3x3 convolution ("v1.5").
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import jbn
from errors import UsageError
from jbn.linen import BatchNorm

STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# Of ImageNet's pixels from 0 to 1: the ones that published weights were trained with.
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Convolutions before a batch norm have no bias: the mean that is subtracted would take it away again.
Conv = functools.partial(
    nn.Conv, use_bias=False, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
)


class ResNet(nn.Module):
    """A ResNet for pictures of bytes, u8[N, H, W, 3]; logits are f32[N, num_classes].

    Attributes:
      depth: 18, 34, 50 or 101 layers.
      num_classes: logits.
      width: channels of the first stage.
      small_images: whether to begin with a 3x3 convolution of stride 1 and no pooling.
      momentum: of the running statistics; weighs the old ones.
      virtual_batch_size: how many pictures are normalized together; None: all.
      dtype: of activations; parameters and statistics are float32.
    """

    depth: int
    num_classes: int
    width: int = 64
    small_images: bool = False
    momentum: float = 0.9
    virtual_batch_size: int | None = None
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, renorm: jbn.Renorm | None = None) -> jax.Array:
        conv = functools.partial(Conv, dtype=self.dtype)
        norm = functools.partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            virtual_batch_size=self.virtual_batch_size,
            renorm=renorm,
            dtype=self.dtype,
        )
        x = (images.astype(jnp.float32) / 255.0 - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)
        x = x.astype(self.dtype)
        if self.small_images:
            x = conv(self.width, (3, 3), padding=1, name="conv_init")(x)
        else:
            x = conv(self.width, (7, 7), strides=2, padding=3, name="conv_init")(x)
        x = norm(activation="relu", name="bn_init")(x)
        if not self.small_images:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        block = ResNetBlock if self.depth < 50 else BottleneckResNetBlock
        for stage, num_blocks in enumerate(STAGES[self.depth]):
            for i in range(num_blocks):
                strides = 2 if stage > 0 and i == 0 else 1
                x = block(self.width * 2**stage, strides, conv, norm)(x)
        # In float32: the mean of many numbers, and the logits, whose differences are the loss.
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes)(x)


class ResNetBlock(nn.Module):
    """Two 3x3 convolutions beside the identity, or beside a projection where the shape changes."""

    features: int
    strides: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(self.features, (3, 3), self.strides, padding=1, name="Conv_0")(x)
        y = self.norm(activation="relu", name="BatchNorm_0")(y)
        y = self.conv(self.features, (3, 3), padding=1, name="Conv_1")(y)
        return _join(self, x, y, "BatchNorm_1")


class BottleneckResNetBlock(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, the last with four times the channels."""

    features: int
    strides: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(self.features, (1, 1), name="Conv_0")(x)
        y = self.norm(activation="relu", name="BatchNorm_0")(y)
        y = self.conv(self.features, (3, 3), self.strides, padding=1, name="Conv_1")(y)
        y = self.norm(activation="relu", name="BatchNorm_1")(y)
        y = self.conv(4 * self.features, (1, 1), name="Conv_2")(y)
        return _join(self, x, y, "BatchNorm_2")


def _join(block: Any, x: jax.Array, y: jax.Array, name: str) -> jax.Array:
    """relu(batch norm of y + x). Its scale begins as 0, each block as the identity (arXiv 1706.02677)."""
    if x.shape != y.shape:
        x = block.conv(y.shape[-1], (1, 1), block.strides, name="conv_proj")(x)
        x = block.norm(name="norm_proj")(x)
    return block.norm(scale_init=nn.initializers.zeros, activation="relu", name=name)(y, residual=x)


def save_model(path: Path, variables: ArrayTree, about: dict[str, Any]) -> None:
    """Writes parameters and statistics, and with them what it takes to use them, as one file."""
    arrays = {name: np.asarray(array) for name, array in flatten_dict(variables, sep="/").items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")  # a run that is killed leaves no half of a model
    save_file(arrays, part, metadata={"about": json.dumps(about)})
    os.replace(part, path)


def load_model(path: Path) -> tuple[ResNet, ArrayTree, dict[str, Any]]:
    """What `save_model` wrote: the net, its variables, and what it takes to use them.

    Returns:
      `about` holds `model`, the net's attributes; `classes`, their names; `image_size` and `center_crop`.
    """
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {})["about"])
            variables = unflatten_dict({name: file.get_tensor(name) for name in file.keys()}, sep="/")  # noqa: SIM118  (no dict)
    except (OSError, SafetensorError, KeyError) as error:
        raise UsageError(f"{path}: not a model of train.py or convert.py: {error}") from None
    return make_model(about["model"]), variables, about


def make_model(attributes: dict[str, Any]) -> ResNet:
    """The net of attributes as a file has them, with the name of the dtype."""
    return ResNet(**attributes | {"dtype": jnp.dtype(attributes["dtype"])})
