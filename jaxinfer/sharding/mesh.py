"""Meshes: the axis `model`, over which tensor-parallel weights are divided, and `data`, over which images are."""

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxinfer.errors import ConfigError
from jaxinfer.sharding import axes


def make_mesh(tensor_parallel_size: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of `tensor_parallel_size` devices on the axis `model`, with Auto axes.

    Auto, because the GEMMs leave their collectives to XLA; what must stay local (cache write, attention)
    runs in `jax.shard_map`. `jax.make_mesh` alone would make Explicit axes.

    Raises:
        ConfigError: fewer devices than `tensor_parallel_size`.
    """
    devices = jax.devices() if devices is None else devices
    if tensor_parallel_size > len(devices):
        raise ConfigError(
            f"tensor_parallel_size is {tensor_parallel_size}, but JAX sees {len(devices)} device(s); lower it, or on "
            "CPU start Python with XLA_FLAGS=--xla_force_host_platform_device_count=N"
        )
    return jax.make_mesh(
        (tensor_parallel_size,), (axes.MODEL,), axis_types=(AxisType.Auto,), devices=devices[:tensor_parallel_size]
    )


def normalise(mesh: Mesh | AbstractMesh, tensor_parallel_size: int | None = None) -> Mesh | AbstractMesh:
    """A user's mesh as the engine uses it: the same devices and axes, all axes Auto (see `make_mesh`).

    `tensor_parallel_size`: what was asked for beside the mesh, if anything was.

    Raises:
        ConfigError: no axis `model`, an axis that means nothing here, or another number of shards than was asked for.
    """
    for name, count in mesh.shape.items():
        if name not in (axes.MODEL, axes.DATA):
            raise ConfigError(
                f"mesh: axis {name!r} of size {count} is unknown; {axes.MODEL!r} divides weights and kv heads and, in "
                "a "
                f"model with a vision tower, {axes.DATA!r} divides images: rename it, or make the mesh with "
                f"jaxinfer.sharding.make_mesh({mesh.size})"
            )
    if axes.MODEL not in mesh.shape:
        raise ConfigError(
            f"mesh: there is no axis {axes.MODEL!r}, only {dict(mesh.shape)}; add one of size 1, or make the mesh with "
            f"jaxinfer.sharding.make_mesh({mesh.size})"
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
    """An axis `data` divides images: it needs a model with a vision tower.

    Raises:
        ConfigError: there is the axis and no tower.
    """
    if axes.DATA in mesh.shape and not has_tower:
        raise ConfigError(
            f"mesh: axis {axes.DATA!r} of size {mesh.shape[axes.DATA]} divides the images of a vision tower, and this "
            f"model has none; put those devices on axis {axes.MODEL!r}, or run an LLM for each group of devices"
        )


def size(mesh: Mesh | AbstractMesh) -> int:
    """How many shards a tensor-parallel weight has on this mesh."""
    return mesh.shape[axes.MODEL]


def processes(mesh: Mesh) -> int:
    """How many processes have devices of this mesh."""
    return len({device.process_index for device in mesh.devices.flat})


def copies(mesh: Mesh | AbstractMesh) -> int:
    """How many devices hold each shard of a tensor-parallel weight: those along `data`."""
    return mesh.size // size(mesh)
