"""Converts a ResNet of torchvision into a model of train.py, and back.

    python examples/resnet/convert.py --source resnet50.pth --output resnet50.safetensors
    python examples/resnet/convert.py --source runs/resnet/model.safetensors --output resnet50.pth

Files that end in .pth are PyTorch's state dicts, and need PyTorch.
"""

import functools
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from chex import ArrayTree

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the examples share

import jbn.tools
from errors import UsageError, one_line_errors
from resnet.data import class_names
from resnet.model import STAGES, load_model, make_model, save_model


def main(
    source: Path, output: Path, classes: Path | None = None, image_size: int = 224, center_crop: float = 0.875
) -> None:
    """Converts a file.

    Args:
      source: A .pth of torchvision's model.state_dict(), or a model.safetensors.
      output: The other of the two.
      classes: From PyTorch: a folder whose folders are the classes; else they are named by number.
      image_size: From PyTorch: pixels of the square that the net sees.
      center_crop: From PyTorch: the part of the shorter side that is seen.
    """
    if {source.suffix, output.suffix} != {".pth", ".safetensors"}:
        raise UsageError(f"{source}, {output}: expected one .pth and one .safetensors")
    try:
        import torch
    except ImportError:
        raise UsageError("files that end in .pth need the package torch") from None
    if source.suffix == ".safetensors":
        _, variables, about = load_model(source)
        if about["model"].get("small_images"):
            raise UsageError(f"{source}: torchvision has no ResNet that begins as with --small-images")
        output.parent.mkdir(parents=True, exist_ok=True)
        arrays = to_torchvision(variables, about["model"]["depth"])
        torch.save({name: torch.tensor(array) for name, array in arrays.items()}, output)
        return
    try:
        state_dict = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # it has many, and none of its own
        raise UsageError(f"{source}: cannot be read by torch.load: {error}") from None
    if not isinstance(state_dict, Mapping):
        raise UsageError(f"{source}: expected a state dict, found a {type(state_dict).__name__}")
    variables, model = from_torchvision(state_dict)
    names = [str(label) for label in range(model["num_classes"])]
    if classes is not None:
        if not classes.is_dir():
            raise UsageError(f"--classes {classes}: no such folder")
        names = class_names(classes)
    if len(names) != model["num_classes"]:
        raise UsageError(
            f"--classes {classes}: has {len(names)} folders, the model {model['num_classes']} classes"
        )
    save_model(
        output,
        variables,
        {"model": model, "classes": names, "image_size": image_size, "center_crop": center_crop},
    )


def from_torchvision(state_dict: Mapping[str, Any]) -> tuple[ArrayTree, dict[str, Any]]:
    """Variables of a ResNet from torchvision's state dict, and the attributes of the net that takes them."""
    depth = depth_of(state_dict)
    variables = jbn.tools.from_torch_state_dict(state_dict, torchvision_mapping(depth))
    width, num_classes = len(state_dict["bn1.weight"]), len(state_dict["fc.bias"])
    model = {"depth": depth, "num_classes": num_classes, "width": width, "dtype": "float32"}
    init = functools.partial(make_model(model).init, train=False)
    like = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 64, 64, 3), jnp.uint8))
    for path, expected in jax.tree.leaves_with_path(like):
        found = functools.reduce(lambda tree, key: tree[key.key], path, variables)
        if found.shape != expected.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UsageError(f"{name} is {found.shape}, and {expected.shape} in a ResNet-{depth}")
    return variables, model


def to_torchvision(variables: ArrayTree, depth: int) -> dict[str, Any]:
    """The state dict of torchvision's resnet18, 34, 50 or 101, as NumPy arrays; of the net's own width."""
    return jbn.tools.torch_state_dict(variables, torchvision_mapping(depth))


def depth_of(names: Iterable[str]) -> int:
    """18, 34, 50 or 101: by the blocks of each stage, and whether they are bottlenecks."""
    found = [re.fullmatch(r"layer(\d)\.(\d+)\.conv(\d)\.weight", name) for name in names]
    places = [tuple(int(number) for number in match.groups()) for match in found if match]
    blocks = tuple(max((b + 1 for s, b, _ in places if s == stage), default=0) for stage in (1, 2, 3, 4))
    is_bottleneck = any(conv == 3 for *_, conv in places)
    for depth, stages in STAGES.items():
        if stages == blocks and (depth >= 50) == is_bottleneck:
            return depth
    raise UsageError(f"no ResNet-18, 34, 50 or 101: it has {blocks} blocks in its stages")


def torchvision_mapping(depth: int) -> dict[str, str]:
    """From the modules of torchvision's ResNet to ours."""
    mapping = {"conv1": "conv_init", "bn1": "bn_init", "fc": "Dense_0"}
    kind, convolutions = ("ResNetBlock", 2) if depth < 50 else ("BottleneckResNetBlock", 3)
    places = [(stage, i) for stage, count in enumerate(STAGES[depth], 1) for i in range(count)]
    for number, (stage, i) in enumerate(places):
        theirs, ours = f"layer{stage}.{i}", f"{kind}_{number}"
        for place in range(convolutions):
            mapping[f"{theirs}.conv{place + 1}"] = f"{ours}/Conv_{place}"
            mapping[f"{theirs}.bn{place + 1}"] = f"{ours}/BatchNorm_{place}"
        if i == 0 and (stage > 1 or depth >= 50):  # where the shape changes
            mapping[f"{theirs}.downsample.0"] = f"{ours}/conv_proj"
            mapping[f"{theirs}.downsample.1"] = f"{ours}/norm_proj"
    return mapping


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
