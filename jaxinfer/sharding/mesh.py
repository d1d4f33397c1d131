"""Meshes: one axis, `model`, over which tensor-parallel weights are divided."""

import jax
from jax.sharding import AxisType, Mesh

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


def size(mesh: Mesh) -> int:
    """How many shards a tensor-parallel weight has on this mesh."""
    return mesh.shape[axes.MODEL]
