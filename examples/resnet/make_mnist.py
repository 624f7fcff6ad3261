"""Writes MNIST, or other IDX files with its names, as folders of PNG files: train/7/00012.png and so on.

python examples/resnet/make_mnist.py
python examples/resnet/make_mnist.py --data-dir fashion --output runs/fashion_png
"""

import sys
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the examples share

from errors import UsageError, one_line_errors
from idx import MNIST, load_splits


def main(data_dir: Path = MNIST, output: Path = Path("runs/mnist_png"), count: int | None = None) -> None:
    """Writes the pictures.

    Args:
      data_dir: Four IDX files with MNIST's names, gzipped or not.
      output: A folder that is not there yet.
      count: Only the first so many of each set.
    """
    if output.exists():
        raise UsageError(f"{output}: is there already (--output)")
    for name, split in zip(("train", "val"), load_splits(data_dir), strict=True):
        for label in np.unique(split.labels):
            (output / name / str(label)).mkdir(parents=True)
        for number, (image, label) in enumerate(zip(split.images[:count], split.labels, strict=False)):
            Image.fromarray(image[..., 0]).save(output / name / str(label) / f"{number:05}.png")
    print(f"{output}: written")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
