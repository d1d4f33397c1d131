"""Compile programs that fuse tensors into parameters on the devices (`checkpoint.fusing`), or split parameters.

Layers of the same shape share a program. A stack of experts whose tensors are passed one by one is filled entry by
entry, in place, so that no second copy of it is needed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxinfer.checkpoint.fusing import Layout, fuse, unfuse
from jaxinfer.checkpoint.safetensors_header import DTYPES
from jaxinfer.checkpoint.source import Source
from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.models.base import Family

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Held:
    """Metadata of an array, as a `checkpoint.source.Source` gives it."""

    shape: tuple[int, ...]
    dtype: str


class ArraySource:
    """`checkpoint.source.Source` over arrays by name, which are never copied to the host."""

    def __init__(self, arrays: Mapping[str, Any]):
        self._arrays = arrays

    def names(self) -> list[str]:
        return list(self._arrays)

    def info(self, name: str) -> Held:
        array = self._arrays[name]
        return Held(tuple(array.shape), _NAMES.get(np.dtype(array.dtype), str(array.dtype)))

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Any:
        return self._arrays[name][slices or ()]

    def release(self) -> None:
        pass


@dataclass(frozen=True)
class Job:
    """A parameter, with its scales if it is quantised, to be fused from tensors."""

    places: list[int]
    """Indices in the flat list of parameters."""
    specs: list[jax.ShapeDtypeStruct]
    """Their shapes, dtypes and shardings."""
    layout: Layout
    rules: list[Rule]
    """Rules of the tensors; none for a parameter of zeros."""
    arrays: list[Any]
    """The tensors, in the order of `rules`."""

    @property
    def complete(self) -> bool:
        """Whether the tensors, or zeros if there are none, replace all of the parameter."""
        stack = range(self.layout.shape[0]) if self.rules and self.rules[0].index is not None else (None,)
        filled = {(rule.index, part) for rule in self.rules for part in rule.parts or ("",)}
        return not filled or filled == {(index, part) for index in stack for part in self.layout.parts}


@dataclass(frozen=True)
class Step:
    """A program that makes a parameter, or one entry of a stack, from tensors."""

    program: jax.stages.Compiled
    arrays: Sequence[Any]
    shardings: Sequence[NamedSharding]
    """Shardings in which the program takes the tensors."""
    index: int | None
    """Entry of the stack; None for all of the parameter."""

    @property
    def tensors(self) -> list[jax.Array]:
        """The tensors on the engine's devices."""
        return list(map(put, self.arrays, self.shardings))


def put(array: Any, sharding: Sharding) -> jax.Array:
    """Put an array where a sharding says.

    With several processes, all of them must call it. An array of one process alone must be equal in all of them.
    """
    whole = not isinstance(array, jax.Array) or array.is_fully_addressable
    if not whole or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    values = np.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype))
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


class FusePrograms:
    """The programs of one model."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._ready: dict[Any, Any] = {}

    def steps(self, job: Job, family: Family) -> list[Step]:
        """Compile the steps that make a parameter: one, or one per entry of a stack with a tensor for each entry."""
        entries: dict[int | None, list[tuple[Rule, Any]]] = {}
        for rule, array in zip(job.rules, job.arrays, strict=True):
            entries.setdefault(rule.index, []).append((rule, array))
        return [self._step(job, family.source, index, filled) for index, filled in entries.items()]

    def _step(
        self,
        job: Job,
        source: Callable[[Source], Source],
        index: int | None,
        filled: Sequence[tuple[Rule, Any]],
    ) -> Step:
        arrays, parts = [array for _, array in filled], tuple(rule.parts for rule, _ in filled)
        names = tuple(_pattern(rule.source) for rule, _ in filled)
        given = {part for own in parts for part in own or ("",)}
        keeps = not job.complete if index is None else given != set(job.layout.parts)
        shardings = [self._source_sharding(job, index, array.shape) for array in arrays]
        tensors = [
            jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype), sharding=sharding)
            for array, sharding in zip(arrays, shardings, strict=True)
        ]
        placed = tuple(spec.sharding for spec in job.specs)
        taken = tuple((one.shape, one.dtype, one.sharding) for one in tensors)
        key = job.layout, parts, names, keeps, index is None, placed, taken
        if key not in self._ready:
            if index is None:
                step = jax.jit(partial(_fuse, job.layout, parts, names, source), out_shardings=list(placed))
                lowered = step.lower(job.specs if keeps else None, *tensors)
            else:
                step = partial(_put, job.layout.entry, parts, names, source, keeps)
                step = jax.jit(step, out_shardings=list(placed), donate_argnums=0)
                lowered = step.lower(job.specs, jax.ShapeDtypeStruct((), np.int32), *tensors)
            self._ready[key] = lowered.compile()
        return Step(self._ready[key], arrays, shardings, index)

    def _source_sharding(self, job: Job, index: int | None, shape: Sequence[int]) -> NamedSharding:
        """Return the sharding of a tensor on the devices: that of its parameter, on the axes whose sizes divide."""
        layout, lead = job.layout, int(job.layout.stacked and index is None)
        own = tuple(getattr(job.specs[0].sharding, "spec", ()))[int(layout.stacked) - lead :]
        spec = list(own[: lead + 1] if layout.outputs else own)
        spec += [None] * (len(shape) - len(spec))
        fits = (name is None or size % self._mesh.shape[name] == 0 for name, size in zip(spec, shape, strict=True))
        return NamedSharding(self._mesh, PartitionSpec(*(name if fit else None for name, fit in zip(spec, fits))))

    def make(self, job: Job, steps: Sequence[Step], params: list[Any]) -> None:
        """Replace a parameter in the list; if none of it is kept, its memory is freed before the new one is made."""
        old = None if job.complete else [params[place] for place in job.places]
        for place in job.places:
            params[place] = None
        if steps and steps[0].index is None:
            made = steps[0].program(old, *steps[0].tensors)
        else:
            made = old and [jnp.copy(array) for array in old]
            made = made or [jnp.zeros(spec.shape, spec.dtype, device=spec.sharding) for spec in job.specs]
            for step in steps:
                made = step.program(made, np.int32(step.index), *step.tensors)
        for place, array in zip(job.places, made, strict=True):
            params[place] = jax.block_until_ready(array)

    def take_apart(self, layout: Layout, rules: Sequence[Rule], family: Family, value: jax.Array) -> list[jax.Array]:
        """Return the tensors of a parameter; a parameter that is a single tensor is returned without a copy."""
        if layout.plain:
            return [family.restore(rule.source, value) for rule in rules]
        parts, names = tuple(rule.parts for rule in rules), tuple(_pattern(rule.source) for rule in rules)
        key = layout, parts, names
        if key not in self._ready:
            self._ready[key] = jax.jit(partial(_unfuse, layout, parts, names, family.restore))
        return self._ready[key](value)


def _pattern(name: str) -> str:
    """Return a tensor's name with zeros for its numbers, so that layers of the same shape share a program."""
    return re.sub(r"\d+", "0", name)


def _read(names: Sequence[str], source: Callable[[Source], Source], tensors: Sequence[jax.Array]) -> list[jax.Array]:
    """Convert tensors from the layout of the family's checkpoints to that of the weight table."""
    return [source(ArraySource({name: one})).read(name) for name, one in zip(names, tensors, strict=True)]


def _fuse(
    layout: Layout, parts: Any, names: Any, source: Any, old: list[jax.Array] | None, *tensors: jax.Array
) -> list[jax.Array]:
    """Make a parameter from tensors; outputs without a tensor are copied from the old parameter."""
    return list(fuse(layout, parts, _read(names, source, tensors), old))


def _put(
    entry: Layout,
    parts: Any,
    names: Any,
    source: Any,
    keeps: bool,
    made: list[jax.Array],
    index: jax.Array,
    *tensors: jax.Array,
) -> list[jax.Array]:
    """Replace one entry of a stack in place; with `keeps`, outputs without a tensor keep their values."""
    old = [jax.lax.dynamic_index_in_dim(array, index, keepdims=False) for array in made] if keeps else None
    new = fuse(entry, parts, _read(names, source, tensors), old)
    return [jax.lax.dynamic_update_index_in_dim(array, one, index, 0) for array, one in zip(made, new, strict=True)]


def _unfuse(layout: Layout, parts: Any, names: Any, restore: Any, value: jax.Array) -> list[jax.Array]:
    """Return the tensors of a parameter in the layout of the family's checkpoints."""
    return [restore(name, one) for name, one in zip(names, unfuse(layout, parts, value), strict=True)]
