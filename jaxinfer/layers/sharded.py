"""Running part of a layer on the local shapes of each device."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxinfer.sharding import axes


def on_shards(local: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any, *operands: Any) -> Any:
    """Call `local` on each device's shards of the operands: in `jax.shard_map`, or directly on a mesh of one device.

    Kernels and cache gathers need local shapes: under Auto axes XLA would add all-gathers around them.

    Args:
        local: function of the local shards.
        mesh: the devices.
        in_specs: a `PartitionSpec` per operand, or a pytree of them.
        out_specs: those of the results.
        *operands: arrays and pytrees with global shapes.
    """
    if mesh.size == 1:
        return local(*operands)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*operands)


def model_axis(shards: int) -> str | None:
    """Return the mesh axis of a layer with this many shards; None for a replicated layer (one shard)."""
    return axes.MODEL if shards > 1 else None
