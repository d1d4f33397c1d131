"""The device side of the paged cache: lanes made once, donated to every step, blocks copied in place."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxinfer.kernels.attention import native_attention
from jaxinfer.kernels.attention.paged import Cache, Lane
from jaxinfer.kv.spec import Full, Latent, State, StateArray
from jaxinfer.sharding import axes, rules
from jaxinfer.sharding import mesh as meshes

LANE_AXES = (axes.BLOCKS, axes.KV_HEADS, axes.BLOCK, axes.HEAD_DIM)
"""The logical axes of one lane array `[N, K, P, D]`."""


def abstract(
    specs: Sequence[Full | State],
    num_blocks: int,
    block_size: int,
    dtype: jnp.dtype,
    mesh: Mesh | AbstractMesh,
    slots: int = 1,
) -> Cache:
    """Shapes and shardings of the cache, one lane a layer: nothing is allocated.

    In the place of a lane a recurrent layer has its own arrays, `[slots, ...]`.
    """
    lanes = []
    for layer, spec in enumerate(specs):
        if isinstance(spec, State):
            make = partial(_state_array, spec, slots, mesh, f"state of layer {layer}")
            lanes.append(jax.tree.map(make, spec.arrays, is_leaf=lambda x: isinstance(x, StateArray)))
            continue
        shape = (num_blocks, spec.heads_on(meshes.size(mesh)), block_size, spec.head_dim)
        placed = rules.sharding(mesh, LANE_AXES, shape, f"cache of layer {layer}", replicated=spec.replicated)
        array = jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
        lanes.append(Lane(array, None if isinstance(spec, Latent) else array))
    return lanes


def _state_array(
    spec: State, slots: int, mesh: Mesh | AbstractMesh, where: str, array: StateArray
) -> jax.ShapeDtypeStruct:
    names, shape = (axes.SLOTS, *array.axes), (slots, *array.shape)
    placed = rules.sharding(mesh, names, shape, where, replicated=spec.replicated)
    return jax.ShapeDtypeStruct(shape, array.dtype, sharding=placed)


def allocate(lanes: Cache) -> Cache:
    """Zeroed arrays of these shapes, each made on the devices that own it."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), lanes)


def block_bytes(specs: Sequence[Full], block_size: int, dtype: jnp.dtype, mesh: Mesh | AbstractMesh) -> int:
    """Bytes one block id takes in all layers, over all devices."""
    tp, itemsize = meshes.size(mesh), jnp.dtype(dtype).itemsize
    return meshes.copies(mesh) * sum(spec.block_bytes(block_size, itemsize, tp) for spec in specs)


def slot_bytes(specs: Sequence[State], mesh: Mesh | AbstractMesh) -> int:
    """Bytes one slot takes in all recurrent layers, over all devices."""
    return meshes.copies(mesh) * sum(spec.slot_bytes(meshes.size(mesh)) for spec in specs)


def copy_blocks(lanes: Cache, sources: jax.Array, targets: jax.Array, *, native: bool = False) -> Cache:
    """Copies block `sources[i]` to `targets[i]` in every lane; a target of N or more is dropped.

    All of a step's copy-on-write in one call, before the step writes. A block that is a target is the source of
    none. `native`: by the CPU's own kernel, which sees one device's arrays.
    """

    def copy(array: jax.Array) -> jax.Array:
        if native:
            return native_attention.copy_blocks(array, sources, targets)
        return array.at[targets].set(array.at[sources].get(mode="clip"), mode="drop")

    return [jax.tree.map(copy, lane) if isinstance(lane, Lane) else lane for lane in lanes]
