"""What batch norm adds to ResNet-50, in training and in evaluation: bytes moved, and memory."""

import dataclasses

import jax.numpy as jnp

from benchmarks.contestants import Contestant, Layer, named, outside
from benchmarks.processes import AHEAD, parallel
from benchmarks.tables import Table, missing

TITLE = "What batch norm adds to ResNet-50, H100"
ABOUT = """\
Batch 128, bfloat16, compiled ahead of time: gigabytes that a training step and an evaluation read and write,
convolutions included, and the peak of temporary memory. In parentheses: relative to the same network with a
bias in the place of each batch norm, which is also what folding leaves in evaluation."""
BASE, NORM = "a bias instead", "jbn, relu inside"
MODES = ("training", "evaluation")


def tables(quick=False):
    from benchmarks import targets

    if quick:
        return [missing(TITLE, "each takes a minute to compile, left out by --quick")]
    if reason := targets.missing("H100"):
        return [missing(TITLE, reason)]
    tasks = [(name, mode) for name in (NORM, BASE) for mode in MODES]
    results = dict(zip(tasks, parallel(f"{__name__}:program", tasks, AHEAD), strict=True))
    if failed := [result["failed"] for result in results.values() if "failed" in result]:
        return [missing(TITLE, failed[0])]
    header, rows = ["layer"], [[NORM], [BASE]]
    for mode in MODES:
        header += [f"{mode}, GB", "peak temporary, GB"]
        for row in rows:
            found, base = results[row[0], mode], results[BASE, mode]
            row += [f"{found['moved']:.1f} ({found['moved'] / base['moved']:.2f})", found["temporary"]]
    return [Table(TITLE, ABOUT, header, rows)]


def program(name, mode):
    """Gigabytes that it moves, and its peak of temporary memory."""
    from benchmarks import network, programs, targets

    contestant = Contestant(BASE, "jax", bias) if name == BASE else named(name)
    make = contestant.make
    of_mode = dataclasses.replace(
        contestant, make=lambda setting: make(dataclasses.replace(setting, training=mode == "training"))
    )
    net = network.ResNet50(of_mode, jnp.dtype("bfloat16"))
    arguments = (net.params, net.state, *net.inputs)

    def evaluate(params, state, *inputs):
        net.have, net.new = (params, state), {}
        return net.loss(*inputs)

    function, donated = (net.step, (0, 1)) if mode == "training" else (evaluate, ())
    shapes = programs.shapes(arguments, targets.place("H100"))
    compiled = targets.compiled(function, shapes, "H100", donate_argnums=donated)
    return {"moved": targets.moved(compiled, "H100") / 1e9, "temporary": targets.temporary(compiled) / 1e9}


def bias(setting):
    """A layer that adds a bias, then residual and relu."""
    params = {"bias": jnp.zeros(setting.shape[-1])}
    return Layer(params, {}, outside(lambda params, state, x: (x + params["bias"].astype(x.dtype), state)))
