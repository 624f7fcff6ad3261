"""Classifies pictures by a program that export.py wrote; copy this file and that folder wherever you like.

    python predict.py runs/resnet/served picture.jpg another.png

It needs JAX, flatbuffers and Pillow, but neither Flax nor jbn nor the files beside it.
"""

import json
import sys
from pathlib import Path

import numpy as np
from jax import export
from PIL import Image


def main(folder: str, *pictures: str) -> None:
    about = json.loads((Path(folder) / "about.json").read_text())
    program = export.deserialize(bytearray((Path(folder) / "model.bin").read_bytes()))
    images = np.stack([read(picture, about["image_size"], about["center_crop"]) for picture in pictures])
    for picture, probabilities in zip(pictures, np.asarray(program.call(images)), strict=True):
        best = np.argsort(-probabilities)[:5]
        guesses = ", ".join(f"{about['classes'][label]} {probabilities[label]:.4f}" for label in best)
        print(f"{picture}: {guesses}")


def read(picture: str, size: int, part: float) -> np.ndarray:
    """The square in the middle, `part` of the shorter side, as in evaluation."""
    image = Image.open(picture).convert("RGB")
    side = part * min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python predict.py FOLDER PICTURE...")
    try:
        main(*sys.argv[1:])
    except OSError as error:  # a file that is missing, or no picture
        sys.exit(f"error: {error}")
