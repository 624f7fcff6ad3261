"""The options of a batch norm: their defaults, what each may be, and which do not go together."""

import dataclasses
import inspect
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import ones, zeros
from jaxtyping import Array

from jbn._core.activation import (
    RELU,
    Activation,
    activation_of,
    first_mixing,
    keeps_shape,
    same_partial,
    trace,
)
from jbn._core.dtypes import as_numeric, unwrapped
from jbn._core.errors import describe, error
from jbn._core.renorm import Renorm
from jbn._core.types import ActivationLike, Axes, AxisIndexGroups, AxisName, X

_APPLY = "Apply it to y."
_ELEMENTWISE = "None, 'relu', or a function of each entry of a real array, such as jax.nn.silu"
_NUMBERS = (int, float, np.number, np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be chosen about a batch norm, by the names of the arguments of `jbn.batch_norm`."""

    axis: Axes = -1
    epsilon: float = 1e-5
    # how statistics are measured
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    virtual_batch_size: int | None = None
    renorm: Renorm | None = None
    # how the running statistics are updated
    momentum: float | Array | None = 0.99
    unbiased: bool = False
    debias: bool = False
    skip_nonfinite: bool = False
    # how they are used
    blend: float | Array | None = None
    # what happens after
    activation: ActivationLike | None = None

    @classmethod
    def of(cls, layer: Any) -> "Options":
        """Those of a layer, which has them as its attributes."""
        return cls(**{field.name: getattr(layer, field.name) for field in dataclasses.fields(cls)})

    def unwrapped(self) -> "Options":
        """The same, with arrays where variables of NNX were given."""
        given = {name: getattr(self, name) for name in ("momentum", "renorm", "blend")}
        arrays = {name: new for name, old in given.items() if (new := unwrapped(old)) is not old}
        return dataclasses.replace(self, **arrays) if arrays else self

    @property
    def looks_at_batch(self) -> bool:
        """Whether evaluation measures the batch: not for a share of 1 of the running statistics."""
        return self.blend is not None and not (is_number(self.blend) and self.blend == 1)


def counters(momentum: float | Array | None, debias: bool) -> tuple[str, ...]:
    """The entries of batch_stats, beside mean and var, that a batch norm with these options keeps."""
    return ("count", "rows") if momentum is None or debias else ()


def check_options(
    options: Options, x: X, axes: tuple[int, ...], weights: Array | None, dtype: np.dtype
) -> None:
    """Each option, and those that do not go together."""
    check_momentum(options.momentum)
    check_epsilon(options.epsilon)
    for name in ("unbiased", "debias", "skip_nonfinite"):
        check_static(name, getattr(options, name))
    if options.debias:
        _check_debias(options.momentum, weights, axes)
    size = options.virtual_batch_size
    if size is not None and (isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1):
        raise error(
            "virtual_batch_size",
            describe(size),
            "a static int from 1 up, or None",
            "Usually 32 to 256.",
        )
    check_renorm(options.renorm, x)
    if options.blend is not None and not is_unit_interval(options.blend):
        raise error(
            "blend",
            describe(options.blend),
            "a number from 0 to 1, a scalar array, or None",
            "It weighs the running statistics: 1 leaves the batch out.",
        )


def check_momentum(momentum: Any) -> None:
    """The share of the old statistics, static or a scalar array; None is cumulative."""
    if momentum is not None and not is_unit_interval(momentum):
        raise error(
            "momentum",
            describe(momentum),
            "a number from 0 to 1, a scalar array, or None (cumulative)",
            "It weighs the old statistics: PyTorch's momentum=0.1 is 0.9 here.",
        )


def check_static_momentum(momentum: float | Array | None) -> None:
    """A momentum for debiasing."""
    if isinstance(momentum, (jax.Array, np.ndarray)):
        raise error(
            "momentum",
            f"{describe(momentum)}, to debias with",
            "a number, or None",
            "What is left of the initial statistics is known for a momentum that stays the same.",
        )


def _check_debias(momentum: float | Array | None, weights: Array | None, axes: tuple[int, ...]) -> None:
    """One momentum, and updates of all channels alike: else their count does not say what is left."""
    check_static_momentum(momentum)
    if weights is not None and any(size != 1 for axis, size in enumerate(weights.shape) if axis not in axes):
        raise error(
            "mask",
            f"{describe(weights)} with debias=True",
            "one for all channels",
            "count is one number for all of them: use momentum=None, which counts by channel.",
        )


def check_debias_init(debias: bool, mean_init: Any, var_init: Any) -> None:
    """With debias, the initial statistics 0 and 1: they are what is divided out."""
    # unwrapped, since nn.with_partitioning gives an initializer names of axes and the same values
    mean_init, var_init = (None if init is None else inspect.unwrap(init) for init in (mean_init, var_init))
    if debias and (mean_init not in (None, zeros) or var_init not in (None, ones)):
        raise error(
            "debias",
            "True with a mean_init or var_init of your own",
            "initial statistics 0 and 1, which debiased evaluation divides out",
            "Leave one of them out.",
        )


def check_epsilon(epsilon: Any) -> None:
    """What is added to the variance: static, so that 0 can be told from the rest."""
    static = (
        not isinstance(epsilon, jax.core.Tracer) and isinstance(epsilon, _NUMBERS) and np.ndim(epsilon) == 0
    )
    if not static or not 0.0 <= float(epsilon) < float("inf"):
        raise error("epsilon", describe(epsilon), "a static number from 0 up", "The usual one is 1e-5.")


def check_static(argument: str, flag: Any) -> None:
    """A choice of what is written, which cannot be made while the compiled program runs."""
    if not isinstance(flag, (bool, np.bool_)):
        raise error(
            argument,
            describe(flag),
            "True or False",
            f"Under jit make it static, jax.jit(..., static_argnames={argument!r}), or close over it.",
        )


def check_renorm(renorm: Any, x: X) -> None:
    """Limits that are possible, and real x."""
    if renorm is None:
        return
    limits = {"r_max": 1, "d_max": 0}
    if not isinstance(renorm, Renorm) or not all(
        _is_scalar_from(lowest, getattr(renorm, name)) for name, lowest in limits.items()
    ):
        raise error(
            "renorm",
            describe(renorm),
            "jbn.Renorm(r_max, d_max) with scalars, r_max from 1 and d_max from 0 up",
            "The paper ends at jbn.Renorm(3.0, 5.0).",
        )
    if renorm.r_min is not None and not is_unit_interval(renorm.r_min):
        raise error(
            "renorm",
            f"given with r_min = {describe(renorm.r_min)}",
            "a scalar r_min from 0 to 1, or None",
            "None is 1 / r_max, as in the paper.",
        )
    if jnp.iscomplexobj(x):
        raise error(
            "renorm",
            f"given for x = {describe(x)}",
            "real x",
            "No paper says how to clip a complex d.",
        )


def _is_scalar_from(lowest: int, value: Any) -> bool:
    """Whether the value is a real scalar, and in the range as far as that is known while tracing."""
    array = as_numeric(value)
    if array is None or array.shape or jnp.iscomplexobj(array):
        return False
    # By NumPy: while jit traces, jnp.asarray(0.5) and a comparison of arrays are traced too.
    return isinstance(value, jax.core.Tracer) or bool(np.asarray(value) >= lowest)


def prepare_axis_name(
    axis_name: AxisName | None, groups: AxisIndexGroups | None
) -> tuple[AxisName | None, tuple[tuple[int, ...], ...] | None]:
    """axis_name and axis_index_groups, hashable; the groups are of equal size and divide a named axis."""
    axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    if any(isinstance(name, int) for name in (axis_name if isinstance(axis_name, tuple) else (axis_name,))):
        raise error(
            "axis_name",
            repr(axis_name),
            "the name that vmap, pmap or a mesh gave an axis",
            "A number is an axis of x: that of the features is axis.",
        )
    if groups is None:
        return axis_name, None
    try:
        fixed = tuple(tuple(operator.index(i) for i in group) for group in groups)
    except TypeError:
        fixed = ()
    if axis_name is None or not any(fixed) or len({len(group) for group in fixed}) != 1:
        raise error(
            "axis_index_groups",
            f"{groups!r} with axis_name={axis_name!r}",
            "groups of equal size of the indices of a named axis",
            "For example axis_name='data', axis_index_groups=[[0, 1], [2, 3]].",
        )
    return axis_name, fixed


def prepare_activation(given: Any, dtype: np.dtype) -> Activation | None:
    """The activation, checked: a function of each entry of a real array, by itself."""
    if given is None:
        return None
    function = jax.nn.relu if isinstance(given, str) and given == "relu" else same_partial(given)
    if not callable(function):
        raise error(
            "activation", describe(given), _ELEMENTWISE, "Pass the function itself, as in jax.nn.gelu."
        )
    name = getattr(function, "func", function)
    shown = f"the function {getattr(name, '__name__', type(name).__name__)}"
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise error("activation", f"{shown} for y of {dtype}", _ELEMENTWISE, _APPLY)
    if function is jax.nn.relu:
        return RELU
    if jax.tree.leaves(function) != [function]:
        raise error(
            "activation",
            f"{shown}, which holds arrays",
            _ELEMENTWISE,
            "They get no gradient here: apply it to y.",
        )
    try:
        hash(function)
    except TypeError:
        raise error("activation", f"{shown}, which has no hash", _ELEMENTWISE, _APPLY) from None
    try:
        traced, result = trace(function, dtype)
    except Exception as cause:
        tried = f"{shown}, which raises {type(cause).__name__} for {dtype}[3,5]"
        raise error(
            "activation", tried, _ELEMENTWISE, "It has to be JAX's and take any shape: apply it to y."
        ) from cause
    if not keeps_shape(result, dtype):
        made = f"{shown}, which makes {describe(result)} of {dtype}[3,5]"
        raise error("activation", made, _ELEMENTWISE, "Apply what changes shape or dtype to y.")
    if (mixing := first_mixing(function, traced, dtype)) is not None:
        raise error(
            "activation", f"{shown}, in which {mixing} may combine or move entries", _ELEMENTWISE, _APPLY
        )
    if any(isinstance(const, jax.core.Tracer) for const in traced.consts):
        raise error(
            "activation",
            f"{shown}, which closes over traced arrays",
            _ELEMENTWISE,
            "They get no gradient here: apply it to y.",
        )
    return activation_of(function, traced, dtype)


def is_number(value: Any) -> bool:
    """Whether it is a number of Python or NumPy, which bool is not here."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_unit_interval(value: Any) -> bool:
    """Whether it is a number from 0 to 1, or a scalar array; of a traced one only the type is known."""
    if isinstance(value, jax.core.Tracer):
        return value.shape == () and jnp.issubdtype(value.dtype, jnp.floating)
    given = np.asarray(value)
    real = any(jnp.issubdtype(given.dtype, kind) for kind in (np.integer, np.floating))
    return given.shape == () and real and bool(0.0 <= given <= 1.0)
