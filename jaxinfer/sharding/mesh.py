"""Device meshes: the axis `model` shards tensor-parallel weights, the axis `data` shards images."""

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxinfer.errors import ConfigError
from jaxinfer.sharding import axes
from jaxinfer.sharding.devices import visible_devices


def make_mesh(tensor_parallel_size: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """Create a mesh of `tensor_parallel_size` devices on the axis `model`, with Auto axes.

    Auto axes leave the collectives of GEMMs to XLA; code that must stay local (cache writes, attention) runs in
    `jax.shard_map`. `jax.make_mesh` creates Explicit axes by default.

    Args:
        tensor_parallel_size: number of devices.
        devices: devices to take the first ones of; None for all that JAX has.

    Raises:
        ConfigError: there are fewer devices than `tensor_parallel_size`, or none of those that JAX was asked for.
    """
    devices = visible_devices() if devices is None else devices
    if tensor_parallel_size > len(devices):
        raise ConfigError(
            f"tensor_parallel_size is {tensor_parallel_size}, but JAX sees {len(devices)} device(s); lower it, or on "
            "CPU start Python with XLA_FLAGS=--xla_force_host_platform_device_count=N"
        )
    return jax.make_mesh(
        (tensor_parallel_size,), (axes.MODEL,), axis_types=(AxisType.Auto,), devices=devices[:tensor_parallel_size]
    )


def normalise(mesh: Mesh | AbstractMesh, tensor_parallel_size: int | None = None) -> Mesh | AbstractMesh:
    """Convert a user's mesh for the engine: the same devices and axes, with all axes Auto (see `make_mesh`).

    Args:
        mesh: the user's mesh.
        tensor_parallel_size: the size requested besides the mesh, if any.

    Raises:
        ConfigError: there is no axis `model`, an unknown axis, or a size that differs from `tensor_parallel_size`.
    """
    for name, count in mesh.shape.items():
        if name not in (axes.MODEL, axes.DATA, axes.FSDP, axes.BATCHES) and not name.startswith(axes.REPLICA):
            raise ConfigError(
                f"mesh: axis {name!r} of size {count} is unknown; {axes.MODEL!r} shards weights and kv heads and, with "
                f"a vision tower, {axes.DATA!r} shards images; say what it is for with axes={{{axes.MODEL!r}: "
                f"{name!r}}} (jaxinfer.sharding.serving_mesh), or make the mesh with "
                f"jaxinfer.sharding.make_mesh({mesh.size})"
            )
    if axes.MODEL not in mesh.shape:
        raise ConfigError(
            f"mesh: there is no axis {axes.MODEL!r}, only {dict(mesh.shape)}; add one of size 1, say which it is with "
            f"axes= (jaxinfer.sharding.serving_mesh), or make the mesh with jaxinfer.sharding.make_mesh({mesh.size})"
        )
    if tensor_parallel_size not in (None, size(mesh)):
        raise ConfigError(
            f"tensor_parallel_size is {tensor_parallel_size}, but axis {axes.MODEL!r} of the mesh has size "
            f"{size(mesh)}; pass one of the two, or make them equal"
        )
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    return mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def check_data_axis(mesh: Mesh | AbstractMesh, has_tower: bool) -> None:
    """Check that a mesh with an axis `data`, which shards images, is used with a vision tower that takes tiles.

    Raises:
        ConfigError: there is such an axis and no vision tower.
    """
    if axes.DATA in mesh.shape and not has_tower:
        raise ConfigError(
            f"mesh: axis {axes.DATA!r} of size {mesh.shape[axes.DATA]} divides the images of a vision tower, and this "
            f"model has none that takes tiles of one size; put those devices on axis {axes.MODEL!r}, or run an LLM for "
            "each group of devices"
        )


def check_fsdp(mesh: Mesh | AbstractMesh, decoder: bool) -> None:
    """Check that a mesh that divides weights over `fsdp` is used with a model that gathers them.

    Raises:
        ConfigError: the model is no text-only decoder.
    """
    if mesh.shape.get(axes.FSDP, 1) > 1 and not decoder:
        raise ConfigError(
            f"mesh: axis {axes.FSDP!r} of size {mesh.shape[axes.FSDP]} divides the weights of text-only decoders, and "
            "this model reads images, audio or encoder inputs; leave it out of axes, so that it holds replicas"
        )


def of_replicas(mesh: Mesh) -> list[Mesh]:
    """Return the mesh of each index of the axis `batches`; the mesh itself if it has no such axis."""
    if axes.BATCHES not in mesh.shape:
        return [mesh]
    place = mesh.axis_names.index(axes.BATCHES)
    names = tuple(name for name in mesh.axis_names if name != axes.BATCHES)
    parts = np.moveaxis(mesh.devices, place, 0)
    return [Mesh(part, names, axis_types=(AxisType.Auto,) * len(names)) for part in parts]


def size(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of shards of a tensor-parallel weight on this mesh."""
    return mesh.shape[axes.MODEL]


def processes(mesh: Mesh) -> int:
    """Return the number of processes with devices in this mesh."""
    return len({device.process_index for device in mesh.devices.flat})


def copies(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of devices that hold the same kv heads: those along every axis but `model`."""
    return mesh.size // size(mesh)
