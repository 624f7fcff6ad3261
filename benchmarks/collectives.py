"""What devices say to each other for one synchronised layer, and that its bytes do not grow with them."""

from benchmarks.processes import AHEAD, CPU, Failed, apart
from benchmarks.tables import Table, missing

TITLE = "Collectives of one synchronised layer"
ROWS, FEATURES = 8, 256  # of x, on each device
ABOUT = f"""\
The batch is cut over the devices with `shard_map`, {FEATURES} channels, float32, compiled for {{where}}.
In each cell: how many collectives, and the bytes that one device puts into them. Adding up the gradients
of the parameters is not part of it."""


def tables(quick=False):
    from benchmarks import targets

    sizes = (8,) if quick else (8, 256)
    target, where = "TPU v5e", "TPU v5e (`v5e:2x4`, `v5e:16x16`)"
    if targets.missing(target):
        target, where = "CPU", "simulated CPU devices"
    try:
        counted = {
            devices: apart(f"{__name__}:count", environment(target, devices), target=target, devices=devices)
            for devices in sizes
        }
    except Failed as error:
        return [missing(TITLE, str(error))]
    header, columns = ["layer"], []
    for program in ("forward", "forward + backward"):
        for devices in sizes:
            header.append(f"{program}, {devices} devices")
            columns.append(counted[devices][program])
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return [Table(TITLE, ABOUT.format(where=where), header, rows)]


def environment(target, devices):
    return CPU | {"JAX_NUM_CPU_DEVICES": str(devices)} if target == "CPU" else AHEAD


def count(target, devices):
    """{program: {layer: "collectives, bytes"}}"""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from benchmarks import contestants, hlo, programs, targets

    mesh, found = targets.mesh(target, devices), {"forward": {}, "forward + backward": {}}
    shape = (ROWS * devices, FEATURES)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P("data")))
    outputs = {"forward": (P("data"), P()), "forward + backward": (P("data"), P(), P("data"))}
    for program, layers in found.items():
        for contestant in contestants.installed():
            made = contestant.make(contestants.Setting(shape, x.dtype, axis_name="data"))
            variables = programs.shapes((made.params, made.state), NamedSharding(mesh, P()))
            arguments = [x] if program == "forward" else [x, x]
            run = jax.shard_map(
                programs.PROGRAMS[program](made),
                mesh=mesh,
                in_specs=(P(), P(), *[P("data") for _ in arguments]),
                out_specs=outputs[program],
                check_vma=False,
            )
            compiled = jax.jit(run).lower(*variables, *arguments).compile()
            calls = hlo.collectives(compiled.as_text())
            layers[contestant.name] = f"{len(calls)}, {sum(size for _, size in calls)} B"
    return found
