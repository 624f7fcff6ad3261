"""Exports a model as a program of its own, for batches of any size: predict.py runs it with JAX alone.

    python examples/resnet/export.py --model runs/resnet/model.safetensors --output runs/resnet/served

Batch norms are folded into the convolutions, the parameters are constants of the program, and it takes the
bytes of pictures and returns the probabilities of the classes.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import tyro
from jax import export

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the examples share

from errors import one_line_errors
from resnet.evaluate import fold
from resnet.model import load_model
from runs import make_folder


def main(model: Path, output: Path, platforms: tuple[str, ...] = ()) -> None:
    """Writes OUTPUT/model.bin and OUTPUT/about.json.

    Args:
      model: A model.safetensors.
      output: A folder that is not there yet.
      platforms: Where the program is to run: cpu, cuda, tpu (default: where this one runs).
    """
    net, variables, about = load_model(model)
    make_folder(output)  # before the work, if it cannot be
    folded = fold(net, variables)

    @jax.jit
    def serve(images: jax.Array) -> jax.Array:
        return jax.nn.softmax(net.apply(folded, images, train=False))

    size = about["image_size"]
    shape = export.symbolic_shape(f"batch, {size}, {size}, 3")
    program = export.export(serve, platforms=platforms or None)(jax.ShapeDtypeStruct(shape, np.uint8))
    (output / "model.bin").write_bytes(program.serialize())
    served = {name: about[name] for name in ("classes", "image_size", "center_crop")}
    (output / "about.json").write_text(json.dumps(served))
    print(f"{output}: written, for {', '.join(program.platforms)}")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
