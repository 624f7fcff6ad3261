"""The ways to cut a batch, each as one function that hides how: whole arrays go in, whole arrays come out.

A way runs `step(params, x, mask, cotangent, axis_name) -> Result` on every device and puts the results
together: y and dx as one batch, the gradients of the parameters summed, the statistics stacked by device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


class Result(NamedTuple):
    y: Any
    dx: Any
    d_params: Any
    batch_stats: Any


def training(apply):
    """The step whose y, new statistics and gradients are compared: `apply(params, x, mask, axis_name)`."""

    def step(params, x, mask, cotangent, axis_name):
        def normalize(params, x):
            return apply(params, x, mask, axis_name)

        y, pullback, batch_stats = jax.vjp(normalize, params, x, has_aux=True)
        d_params, dx = pullback(cotangent)
        return Result(y, dx, d_params, batch_stats)

    return step


@dataclasses.dataclass(frozen=True)
class Way:
    """A name, the sizes and names of the mapped axes, how they are mapped, and by which jit (not in pmap)."""

    name: str
    sizes: tuple[int, ...]
    kind: str
    axes: tuple[str, ...] = ("data",)
    order: tuple[str, ...] | None = None
    spec: P | None = None
    compile: Callable[..., Any] = jax.jit

    @property
    def devices(self):
        return math.prod(self.sizes)

    @property
    def axis_name(self):
        names = self.order or self.axes
        return names if len(names) > 1 else names[0]

    def jit(self, step):
        """`step` on whole arrays, (params, x, mask, cotangent) -> Result, compiled once per kind of mask."""
        return getattr(self, f"_{self.kind}")(functools.partial(step, axis_name=self.axis_name))

    def mesh(self, axis_type=AxisType.Auto):
        return jax.make_mesh(self.sizes, self.axes, axis_types=(axis_type,) * len(self.sizes))

    def _vmap(self, step):
        for name in reversed(self.axes):
            step = jax.vmap(step, in_axes=(None, 0, 0, 0), axis_name=name)
        return self.compile(self._stacked(step))

    def _pmap(self, step):
        """An argument that is None stays out: `pmap` would take the size of the axis from another array."""
        mapped = functools.partial(jax.pmap, axis_name=self.axes[0])
        masked = mapped(step, in_axes=(None, 0, 0, 0))
        bare = mapped(lambda params, x, cotangent: step(params, x, None, cotangent), in_axes=(None, 0, 0))

        def run(params, x, mask, cotangent):
            return bare(params, x, cotangent) if mask is None else masked(params, x, mask, cotangent)

        return self._stacked(run)

    def _vmap_in_shard_map(self, step):
        """The outer axis is of a mesh, the inner one of `vmap`."""
        mesh = jax.make_mesh(self.sizes[:1], self.axes[:1], axis_types=(AxisType.Auto,))
        step = jax.vmap(step, in_axes=(None, 0, 0, 0), axis_name=self.axes[1])

        def inner(*arguments):
            return _leading(step(*_trailing(arguments)))

        split = P(self.axes[0])
        run = jax.shard_map(
            inner, mesh=mesh, in_specs=(P(), split, split, split), out_specs=split, check_vma=False
        )
        return self.compile(self._stacked(run))

    def _stacked(self, run):
        """Cuts the first axis of everything but the parameters, and puts the results together again."""

        def cut(array):
            return array.reshape(*self.sizes, -1, *array.shape[1:])

        def whole(array):
            return array.reshape(-1, *array.shape[len(self.sizes) + 1 :])

        def by_device(array):
            return array.reshape(self.devices, *array.shape[len(self.sizes) :])

        def stacked(params, *split):
            y, dx, d_params, batch_stats = run(params, *jax.tree.map(cut, split))
            d_params, batch_stats = jax.tree.map(by_device, (d_params, batch_stats))
            return Result(whole(y), whole(dx), jax.tree.map(lambda a: a.sum(0), d_params), batch_stats)

        return stacked

    def _shard_map(self, step):
        """Under check_vma gradients of replicated parameters arrive summed, and JAX proves what is equal."""
        split = P(self.axes)
        run = jax.shard_map(
            step,
            mesh=self.mesh(),
            in_specs=(P(), split, split, split),
            out_specs=Result(split, split, P(), P()),
        )
        return self.compile(self._one_device(run))

    def _unchecked(self, step):
        def summed(*arguments):
            y, dx, d_params, batch_stats = step(*arguments)
            d_params = jax.lax.psum(d_params, self.axis_name)
            return Result(y, dx, d_params, jax.tree.map(lambda a: a[None], batch_stats))

        split = P(self.axes)
        run = jax.shard_map(
            summed,
            mesh=self.mesh(),
            in_specs=(P(), split, split, split),
            out_specs=Result(split, split, P(), split),
            check_vma=False,
        )
        return self.compile(run)

    def _nested(self, step):
        """A shard_map over each axis, one within the other."""
        outer, inner = self.axes

        def within(*arguments):
            return jax.shard_map(
                step,
                axis_names={inner},
                in_specs=(P(), P(inner), P(inner), P(inner)),
                out_specs=Result(P(inner), P(inner), P(), P()),
            )(*arguments)

        run = jax.shard_map(
            within,
            mesh=self.mesh(),
            axis_names={outer},
            in_specs=(P(), P(outer), P(outer), P(outer)),
            out_specs=Result(P(outer), P(outer), P(), P()),
        )
        return self.compile(self._one_device(run))

    def _auto(self, step):
        return self._global(step, AxisType.Auto)

    def _explicit(self, step):
        return self._global(step, AxisType.Explicit)

    def _global(self, step, axis_type):
        """No axis_name: one program over arrays that are sharded."""
        mesh = self.mesh(axis_type)
        run = self.compile(self._one_device(functools.partial(step, axis_name=None)))

        def place(array):
            wanted = [name if size > 1 else None for name, size in zip(self.spec, array.shape, strict=False)]
            return jax.device_put(array, NamedSharding(mesh, P(*wanted)))

        def placed(params, *split):
            with jax.set_mesh(mesh):
                return run(params, *jax.tree.map(place, split))

        return placed

    @staticmethod
    def _one_device(run):
        def stacked(*arguments):
            y, dx, d_params, batch_stats = run(*arguments)
            return Result(y, dx, d_params, jax.tree.map(lambda a: a[None], batch_stats))

        return stacked


def _trailing(arguments):
    """(params, *split) without the mesh axis, of which a device holds one slice."""
    params, *split = arguments
    return params, *jax.tree.map(lambda a: a[0], split)


def _leading(result):
    return jax.tree.map(lambda a: a[None], result)


ONE = Way("one device", (1,), "vmap")
WAYS = [
    Way("vmap over 2", (2,), "vmap"),
    Way("vmap over 8", (8,), "vmap"),
    Way("vmap over 16", (16,), "vmap"),
    Way("nested vmap", (2, 4), "vmap", ("a", "b")),
    Way("nested vmap, names turned round", (2, 4), "vmap", ("a", "b"), order=("b", "a")),
    Way("pmap", (8,), "pmap"),
    Way("shard_map", (8,), "shard_map"),
    Way("shard_map, unchecked", (8,), "unchecked"),
    Way("shard_map over two axes", (4, 2), "shard_map", ("a", "b")),
    Way(
        "shard_map over two axes, unchecked, names turned round", (4, 2), "unchecked", ("a", "b"), ("b", "a")
    ),
    Way("shard_map in shard_map", (2, 4), "nested", ("a", "b")),
    Way("vmap in shard_map", (2, 2), "vmap_in_shard_map", ("a", "b")),
    Way("vmap in shard_map over 16", (4, 4), "vmap_in_shard_map", ("a", "b")),
    *(
        Way(f"jit, {kind} axes, {where} sharded", (4, 2), kind, ("a", "b"), spec=spec)
        for kind in ("auto", "explicit")
        for where, spec in {
            "examples": P(("a", "b")),
            "examples and features": P("a", None, "b"),
            "rows": P(None, "b"),
        }.items()
    ),
    Way("jit, explicit axes, features sharded", (4, 2), "explicit", ("a", "b"), spec=P(None, None, "a")),
]
BY_NAME = {way.name: way for way in WAYS}
