"""Placement plan of a model: where each weight lies, computed from shapes before any weight is read.

`plan(module, mesh)` reads it from an NNX module, abstract or not; `jaxinfer.sharding.plan` makes one from a
config.json.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxinfer.sharding import axes, rules
from jaxinfer.sharding.collectives import STEPS, Collective, Exchanging
from jaxinfer.sharding.placement_html import render
from jaxinfer.sharding.placement_rows import Exchange, Placed, Row
from jaxinfer.sharding.policy import EXPERTS, REPLICATE, SHARD


@dataclass(frozen=True, repr=False)
class Plan(Placed):
    """Placement of a model's weights, memory per device, and collectives per step; displays as HTML in a notebook."""

    def as_dict(self) -> dict[str, Any]:
        """Convert the plan to plain JSON values; sizes are bytes per device unless named otherwise."""
        return {
            "model": self.model,
            "mesh": dict(self.mesh),
            "devices": self.devices,
            "placement": dict(self.patterns),
            "device_bytes": self.device_bytes,
            "all_devices_bytes": self.device_bytes * self.devices,
            "copied_bytes": self.copied_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "draft_bytes": self.draft_bytes,
            "modules": self.modules,
            "parameters": [row.as_dict() for row in self.rows],
            "collectives": {step: self.collectives(step) for step in self.steps},
            "exchanges": [exchange.as_dict() for exchange in self.exchanges],
            "cache": None if self.cache is None else self.cache.as_dict(),
            "memory": None
            if self.memory is None
            else {
                "device_bytes": self.memory,
                "step_bytes": self.step_bytes,
                "cache_bytes": self.cache_bytes,
                "tokens": self.tokens,
            },
        }

    def __repr__(self) -> str:
        return (
            f"Plan({self.model!r}, mesh={dict(self.mesh)}, {len(self.rows)} parameters, "
            f"{self.device_bytes} bytes a device, decode: {self.collectives(STEPS[0])})"
        )

    def _repr_html_(self) -> str:
        return render(self)


def plan(
    module: nnx.Module, mesh: Mesh | AbstractMesh, *, itemsize: int, more: Iterable[Exchange] = (), **fields: Any
) -> Plan:
    """Compute the plan of a module from the metadata of its parameters and its declared collectives.

    Args:
        module: an NNX module with values or shapes.
        mesh: may be abstract, without real devices.
        itemsize: bytes per element of the activations.
        more: collectives outside the module.
        **fields: other fields of `Plan`.

    Raises:
        ConfigError: a parameter does not divide over the mesh.
    """
    rows, exchanges = [], []
    for path, part, steps in walk(module):
        rows += _rows(path, part, mesh, tuple(steps))
        if isinstance(part, Exchanging):
            exchanges += [exchange(".".join(path), made, steps, itemsize) for made in part.collectives()]
    return Plan(dict(mesh.shape), tuple(rows), (*exchanges, *more), **fields)


def exchange(module: str, made: Collective, steps: Sequence[str], itemsize: int) -> Exchange:
    """Make an `Exchange` of a module's collective, with its size for activations of `itemsize` bytes."""
    return Exchange(module, made, tuple(steps), made.arrays * made.width * (made.itemsize or itemsize))


def walk(module: nnx.Module) -> Iterator[tuple[tuple[str, ...], nnx.Module, Sequence[str]]]:
    """Yield every module once, parents first: its path, the module, and the steps that run it."""
    seen, left = set(), [((), module, STEPS)]
    while left:
        path, part, steps = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        steps = getattr(part, "steps", steps)
        yield path, part, steps
        children = [
            ((*path, str(name)), child, steps)
            for name, child in nnx.iter_children(part)
            if isinstance(child, nnx.Module)
        ]
        left += reversed(children)


def array_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Return the bytes of an array."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def device_bytes(array: jax.ShapeDtypeStruct | jax.Array) -> int:
    """Return the bytes of an array's shard on each device."""
    return array_bytes(array.sharding.shard_shape(tuple(array.shape)), array.dtype)


def _rows(path: Sequence[str], part: nnx.Module, mesh: Mesh | AbstractMesh, steps: tuple[str, ...]) -> Iterator[Row]:
    for name, param in vars(part).items():
        if not isinstance(param, nnx.Variable) or "logical_axes" not in param.get_metadata():
            continue
        metadata, where, shape = param.get_metadata(), ".".join([*path, name]), tuple(param.shape)
        placed = rules.of(mesh, metadata, shape, where)
        yield Row(
            path=where,
            module=metadata["module"],
            tactic=_tactic(metadata),
            shape=shape,
            dtype=np.dtype(param.dtype).name,
            logical_axes=tuple(metadata["logical_axes"]),
            spec=placed.spec,
            device_bytes=array_bytes(placed.shard_shape(shape), param.dtype),
            copies=_copies(placed, mesh),
            # Adapters are no part of the checkpoint.
            checkpoint_bytes=array_bytes(_own_shape(metadata, shape), param.dtype) * isinstance(param, nnx.Param),
            steps=steps,
        )


def _tactic(metadata: Mapping[str, Any]) -> str:
    if metadata["replicated"]:
        return REPLICATE
    return EXPERTS if axes.EXPERT in metadata["logical_axes"] else SHARD


def _copies(placed: NamedSharding, mesh: Mesh | AbstractMesh) -> int:
    """Return the number of devices that hold the same shard."""
    used = [name for axis in placed.spec if axis is not None for name in (axis if isinstance(axis, tuple) else (axis,))]
    return mesh.size // int(np.prod([mesh.shape[name] for name in used], dtype=np.int64))


def _own_shape(metadata: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a parameter's weights in the checkpoint."""
    if metadata.get("stacked"):
        one = {name: value for name, value in metadata.items() if name != "stacked"}
        return (shape[0], *_own_shape(one, shape[1:]))
    if "outputs" in metadata:  # `[tp, columns, ...]` with the columns of all outputs
        return (sum(output.rows for output in metadata["outputs"]), *shape[2:])
    return tuple(metadata.get("unpadded") or shape)
