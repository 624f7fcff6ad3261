"""A whole model's arrays, between PyTorch and Flax.

A mapping names the modules; what kind a module is shows in its arrays: batch norm by `torch.py`, Conv and
Dense by the order of the axes of their kernels.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jbn._core.errors import describe, error, join_names, named_errors, public
from jbn.tools._convert.arrays import read, to_jax, to_numpy
from jbn.tools._convert.libraries import TORCH, brief
from jbn.tools._convert.torch import torch_arrays
from jbn.tools._models import Path, Variables, as_dicts, join_paths, path_name

ModuleMapping: TypeAlias = Mapping[str, str | Path]
"""PyTorch module ("layer1.0.bn1") to Flax module ("BasicBlock_0/BatchNorm_0", or a tuple)."""

_KINDS = "the arrays of a Conv, Dense or batch norm"
_COVER = "Map each module that has arrays, and no other; take out what you convert by hand."
_OTHERS = "Convert other kinds by hand, and leave them out of both sides."


@public
def from_torch_state_dict(
    state_dict: Mapping[str, Any], mapping: ModuleMapping, *, prefix: str = ""
) -> dict[str, Any]:
    """Flax variables of a PyTorch model.

    - Batch norm: as `from_torch`. Its counter becomes `count` beside mean and var; Flax's layers leave it as
      it is, and `torch_state_dict` writes it back.
    - Conv, of any number of spatial axes, grouped or not: OIHW becomes HWIO.
    - Dense (Linear): [out, in] becomes [in, out].

    Only arrays are converted. Match yourself what the model does with them:

    - `Conv(padding=1)` in PyTorch pads both sides by 1; with strides, Flax's "SAME" does not.
    - epsilon and momentum: `settings_from`.
    - A Dense after a flattened image: PyTorch flattens [C, H, W], Flax [H, W, C]. Move the channels first.
    - ConvTranspose, Embedding and DenseGeneral are not converted, and cannot always be told from Conv and
      Dense by their arrays: do not map them.

    Args:
      state_dict: tensors of any dtype and device, or arrays.
      mapping: the PyTorch module, such as "layer1.0.bn1" ("" is the model itself), to the Flax module, such
        as "BasicBlock_0/BatchNorm_0" or a tuple: each module with arrays of its own, once.
      prefix: what each name begins with and the mapping leaves out, such as the "module." of
        `torch.nn.DataParallel`.

    Returns:
      `{"params": ..., "batch_stats": ...}`, without a collection that would be empty. Copies, as JAX arrays
      of the same values and dtypes.

    Raises:
      ValueError: entries that no module of the mapping has; modules without an entry, or of another kind. The
        first of them are named.

    Example:
      >>> import numpy as np, jax, jbn.tools
      >>> state_dict = {
      ...     "conv.weight": np.zeros((8, 3, 5, 5), "f"),
      ...     "bn.weight": np.ones(8, "f"),
      ...     "bn.bias": np.zeros(8, "f"),
      ...     "bn.running_mean": np.zeros(8, "f"),
      ...     "bn.running_var": np.ones(8, "f"),
      ...     "bn.num_batches_tracked": np.array(7),
      ... }
      >>> mapping = {"conv": "Conv_0", "bn": "BatchNorm_0"}
      >>> variables = jbn.tools.from_torch_state_dict(state_dict, mapping)
      >>> print(jax.tree.map(np.shape, variables["params"]))
      {'BatchNorm_0': {'bias': (8,), 'scale': (8,)}, 'Conv_0': {'kernel': (5, 5, 3, 8)}}
      >>> back = jbn.tools.torch_state_dict(variables, mapping)
      >>> print(all(np.array_equal(back[name], array) for name, array in state_dict.items()))
      True

    Reference: Flax's guide "Convert PyTorch models to Flax".
    """
    paths = _paths(mapping)
    fix = "Pass model.state_dict()."
    if not isinstance(state_dict, Mapping):
        raise error("state_dict", brief(state_dict), "a mapping of names to arrays", fix)
    if wrong := [repr(key) for key in state_dict if not isinstance(key, str)]:
        expected = "names of arrays such as 'fc.weight'"
        raise error("state_dict", f"one with {join_names(wrong)}", expected, fix)
    _check_prefix(prefix)
    common = _common_prefix(state_dict, paths)
    hint = f"Pass prefix={common!r}, with which every name begins." if common not in ("", prefix) else ""
    if without := [key for key in state_dict if not key.startswith(prefix)]:
        raise error(
            "prefix",
            f"{prefix!r}, missing in {len(without)} of {len(state_dict)} names: {join_names(without)}",
            "what each name in the state_dict begins with",
            hint or "Take out what you convert by hand, and leave prefix out where names have none.",
        )
    modules: dict[str, dict[str, Any]] = {}
    left = []
    for key, value in state_dict.items():
        module, _, name = key.removeprefix(prefix).rpartition(".")
        if module in paths:
            modules.setdefault(module, {})[name] = value
        else:
            left.append(key)
    _check_covered("state_dict", left, [module for module in paths if module not in modules], hint or _COVER)
    flat: dict[str, dict[Path, Any]] = {"params": {}, "batch_stats": {}}
    for module, path in paths.items():
        with named_errors(layer=f"module {module!r}"):
            for collection, arrays in _from_module(modules[module]).items():
                flat[collection] |= {(*path, name): array for name, array in arrays.items()}
    taken = {full for tree in flat.values() for full in tree}
    inside = [path for path in paths.values() if any(path[:n] in taken for n in range(len(path) + 1))]
    if inside:
        expected = "paths of modules, and none inside of an array"
        fix = "Each module has a path of its own."
        raise error("mapping", f"one with {join_paths(list(map(path_name, inside)))}", expected, fix)
    return {collection: unflatten_dict(leaves) for collection, leaves in flat.items() if leaves}


@public
def torch_state_dict(
    variables: Variables, mapping: ModuleMapping, *, prefix: str = ""
) -> dict[str, np.ndarray]:
    """The state_dict of a PyTorch model: the inverse of `from_torch_state_dict`, bit for bit.

        arrays = torch_state_dict(variables, mapping)
        model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})

    Batch norms without a `count` get no num_batches_tracked; load_state_dict then leaves the module's own.

    Args:
      variables: linen variables with `params` and `batch_stats` only, or an NNX module.
      mapping: as for `from_torch_state_dict`.
      prefix: what each name begins with, before what the mapping says.

    Returns:
      NumPy arrays, copies, by name.

    Raises:
      ValueError: leaves that no module of the mapping has; modules without a leaf, or of another kind. The
        first of them are named.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, jbn.tools
      >>> variables = nn.Dense(4).init(jax.random.key(0), jnp.ones((1, 3)))
      >>> state_dict = jbn.tools.torch_state_dict(variables, {"fc": ()})
      >>> print({name: array.shape for name, array in state_dict.items()})
      {'fc.weight': (4, 3), 'fc.bias': (4,)}
    """
    paths = _paths(mapping)
    _check_prefix(prefix)
    modules: dict[Path, dict[str, dict[str, Any]]] = {}
    left = []
    for collection, tree in as_dicts(variables).items():
        for full, value in flatten_dict(tree).items():
            path: Path = tuple(map(str, full[:-1]))
            if path in paths.values() and collection in ("params", "batch_stats"):
                entries = modules.setdefault(path, {"params": {}, "batch_stats": {}})
                entries[collection][full[-1]] = value
            else:
                left.append(path_name((collection, *full)))
    empty = [path_name(path) for path in paths.values() if path not in modules]
    _check_covered("variables", left, empty, _COVER)
    state_dict: dict[str, np.ndarray] = {}
    for module, path in paths.items():
        with named_errors(layer=f"module {module!r}"):
            arrays = _to_module(**modules[path])
        start = f"{prefix}{module}." if module else prefix
        state_dict |= {f"{start}{name}": array for name, array in arrays.items()}
    return state_dict


def _from_module(arrays: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """One module's collections."""
    if "running_mean" in arrays or "running_var" in arrays:
        params, batch_stats = read(TORCH, arrays)
        return {"params": params, "batch_stats": batch_stats}
    host = {name: to_numpy(name, array) for name, array in arrays.items()}
    _check_kernel("state_dict", "weight", host, 0)
    kernel = host.pop("weight")
    host["kernel"] = kernel.transpose(*range(2, kernel.ndim), 1, 0)
    return {"params": {name: to_jax(name, np.array(host[name], order="C")) for name in sorted(host)}}


def _to_module(params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One module's state_dict."""
    if batch_stats:
        return torch_arrays(params, batch_stats)
    host = {name: to_numpy(name, array) for name, array in params.items()}
    _check_kernel("params", "kernel", host, -1)
    kernel = host.pop("kernel")
    back = kernel.transpose(kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))
    return {"weight": np.array(back, order="C")} | host


def _check_kernel(argument: str, name: str, arrays: Mapping[str, np.ndarray], out: int) -> None:
    """A kernel of two axes or more, and perhaps a bias, as long as its axis `out`; nothing else."""
    kernel, bias = arrays.get(name), arrays.get("bias")
    good = kernel is not None and kernel.ndim >= 2 and not arrays.keys() - {name, "bias"}
    if not good or (bias is not None and bias.shape != (arrays[name].shape[out],)):
        got = join_names(f"{key} {describe(array)}" for key, array in arrays.items())
        raise error(argument, got, _KINDS, _OTHERS)


def _paths(mapping: Any) -> dict[str, Path]:
    """The mapping with paths as tuples, no two of them the same."""
    expected = "a mapping of PyTorch modules to Flax modules"
    fix = "For example {'conv': 'Conv_0', 'bn': 'BatchNorm_0'}."
    if not isinstance(mapping, Mapping):
        raise error("mapping", brief(mapping), expected, fix)
    paths: dict[str, Path] = {}
    for prefix, path in mapping.items():
        if not isinstance(prefix, str) or not isinstance(path, (str, tuple, list)):
            raise error("mapping", f"one with {prefix!r}: {path!r}", expected, fix)
        parts: Path = tuple(filter(None, path.split("/")) if isinstance(path, str) else map(str, path))
        if parts in paths.values():
            got, once = f"one with {path_name(parts)} twice", "each Flax module once"
            fix = "A module that is shared, and listed twice by PyTorch, is one in Flax: take out the second."
            raise error("mapping", got, once, fix)
        paths[prefix] = parts
    return paths


def _check_prefix(prefix: Any) -> None:
    if not isinstance(prefix, str):
        fix = "For example 'module.', as torch.nn.DataParallel has it."
        raise error("prefix", brief(prefix), "what each name in the state_dict begins with", fix)


def _common_prefix(keys: Collection[str], paths: Collection[str]) -> str:
    """What every name begins with before modules that are mapped: data parallel models have "module."."""
    modules = [key.rpartition(".")[0].split(".") for key in keys]
    first = modules[0] if modules else []
    tails = [tail for tail in range(1, len(first) + 1) if ".".join(first[tail:]) in paths]
    common = [first[:tail] for tail in tails if all(module[:tail] == first[:tail] for module in modules)]
    return ".".join([*common[0], ""]) if common else ""


def _check_covered(argument: str, left: list[str], empty: list[str], fix: str) -> None:
    """Nothing is dropped, and nothing is mapped in vain."""
    found = [f"the unmapped {join_paths(left)}"] if left else []
    names = [repr(name or "the model itself") for name in empty]
    found += [f"nothing of the mapped {join_paths(names)}"] if names else []
    if found:
        raise error(argument, f"one with {' and '.join(found)}", "exactly what mapping names", fix)
