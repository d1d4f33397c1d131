"""The engine's mesh over a trainer's: the same devices, with the axes that the engine uses under its own names."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import AxisType, Mesh

from jaxinfer.errors import ConfigError
from jaxinfer.sharding import axes as names

NAMED = {
    names.MODEL: "divides weights and kv heads",
    names.FSDP: "divides weights that are gathered layer by layer",
    names.DATA: "runs a batch of its own at each index",
}
"""Axes of the engine that `axes` may map to those of a user's mesh, each with its purpose."""

Axes = Mapping[str, str | Sequence[str]]
"""Names of `NAMED`, each mapped to an axis of the user's mesh, or to several that it stands for together."""


def serving_mesh(mesh: Mesh, axes: Axes) -> Mesh:
    """Return a mesh over the devices of a trainer's mesh, with the engine's names for its axes.

    Axes that are not named hold replicas. What `data` names becomes one axis, `batches`. Devices keep their order,
    unless axes are named together that are not neighbours in the trainer's mesh.

    Args:
        mesh: the trainer's mesh, such as one with the axes `("dp", "fsdp", "tp")`.
        axes: such as `{"model": "tp"}`, `{"model": ("fsdp", "tp")}`, `{"model": "tp", "fsdp": "fsdp"}` or
            `{"model": "tp", "data": "dp"}`.

    Raises:
        ConfigError: the mesh lacks an axis, an axis is named twice, or a name is unknown.
    """
    named = _named(mesh, axes)
    order = list(mesh.axis_names)
    for own in named.values():
        if len(own) > 1:
            first = min(order.index(axis) for axis in own)
            before = [axis for axis in order[:first] if axis not in own]
            order = [*before, *own, *(axis for axis in order if axis not in own and axis not in before)]
    devices = mesh.devices.transpose([mesh.axis_names.index(axis) for axis in order])
    owner = {axis: names.BATCHES if name == names.DATA else name for name, own in named.items() for axis in own}
    sizes: dict[str, int] = {}
    for axis in order:
        name = owner.get(axis, names.REPLICA + axis)
        sizes[name] = sizes.get(name, 1) * mesh.shape[axis]
    sizes.setdefault(names.MODEL, 1)
    return Mesh(devices.reshape(*sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _named(mesh: Mesh, axes: Any) -> dict[str, tuple[str, ...]]:
    """Return the axes of the mesh that each name stands for."""
    if not isinstance(axes, Mapping):
        raise ConfigError(f"axes must map {', '.join(NAMED)} to axes of the mesh, got {axes!r}")
    found: dict[str, tuple[str, ...]] = {}
    for name, own in axes.items():
        if name not in NAMED:
            raise ConfigError(
                f"axes: {name!r} is unknown; known: "
                + "; ".join(f"{known!r} {what}" for known, what in NAMED.items())
                + "; axes of the mesh that are not named hold replicas"
            )
        own = (own,) if isinstance(own, str) else tuple(own)
        for axis in own:
            if axis not in mesh.shape:
                raise ConfigError(f"axes: {name!r} is mapped to {axis!r}, which the mesh lacks; it has {_sizes(mesh)}")
        found[name] = own
    used = [axis for own in found.values() for axis in own]
    twice = sorted({axis for axis in used if used.count(axis) > 1})
    if twice:
        raise ConfigError(f"axes: axis {twice[0]!r} of the mesh is named twice in {dict(axes)}; name it once")
    return found


def _sizes(mesh: Mesh) -> str:
    return ", ".join(f"{name!r} of size {size}" for name, size in mesh.shape.items()) or "no axes"
