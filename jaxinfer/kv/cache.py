"""Device side of the paged cache: allocate its arrays, size them, and copy blocks for copy-on-write."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxinfer.kernels.attention import native_attention
from jaxinfer.kernels.attention.paged import Cache, KVCache
from jaxinfer.kernels.attention.quantised_cache import SCALE
from jaxinfer.kv.spec import Full, Latent, Lent, Spec, State, StateArray
from jaxinfer.sharding import axes, rules
from jaxinfer.sharding import mesh as meshes

CACHE_AXES = (axes.BLOCKS, axes.KV_HEADS, axes.BLOCK, axes.HEAD_DIM)
"""Logical axes of one cache array `[N, K, P, D]`."""


def abstract(
    specs: Sequence[Spec],
    num_blocks: int,
    block_size: int,
    dtype: jnp.dtype,
    mesh: Mesh | AbstractMesh,
    slots: int = 1,
) -> Cache:
    """Describe shapes and shardings of the cache without allocating it.

    Args:
        specs: what each layer stores.
        num_blocks: N.
        block_size: P.
        dtype: of keys and values that are not quantised.
        mesh: the devices.
        slots: state slots of recurrent layers.

    Returns:
        One entry per layer: a `KVCache` of arrays `[N, K, P, D]` (values are None for `Latent`) and, if quantised,
        scales `[N, K, P, 1]`, or for a recurrent layer its own arrays `[slots, ...]`; None for `Lent`.
    """
    cache = []
    for layer, spec in enumerate(specs):
        if isinstance(spec, State):
            make = partial(_state_array, spec, slots, mesh, f"state of layer {layer}")
            cache.append(jax.tree.map(make, spec.arrays, is_leaf=lambda x: isinstance(x, StateArray)))
            continue
        if isinstance(spec, Lent):
            cache.append(None)
            continue
        shape = num_blocks, spec.heads_on(meshes.size(mesh)), block_size
        make = partial(_array, mesh=mesh, where=f"cache of layer {layer}", replicated=spec.replicated)
        array = make((*shape, spec.head_dim), spec.codes or dtype)
        scales = None if spec.codes is None else make((*shape, 1), SCALE)
        both = not isinstance(spec, Latent)
        cache.append(KVCache(array, array if both else None, scales, scales if both else None))
    return cache


def _array(
    shape: tuple[int, ...], dtype: jnp.dtype, *, mesh: Mesh | AbstractMesh, where: str, replicated: bool
) -> jax.ShapeDtypeStruct:
    placed = rules.sharding(mesh, CACHE_AXES, shape, where, replicated=replicated)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)


def _state_array(
    spec: State, slots: int, mesh: Mesh | AbstractMesh, where: str, array: StateArray
) -> jax.ShapeDtypeStruct:
    names, shape = (axes.SLOTS, *array.axes), (slots, *array.shape)
    placed = rules.sharding(mesh, names, shape, where, replicated=spec.replicated)
    return jax.ShapeDtypeStruct(shape, array.dtype, sharding=placed)


def allocate(cache: Cache) -> Cache:
    """Allocate zeroed arrays of these shapes, each on the devices that own it."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), cache)


def block_bytes(specs: Sequence[Full], block_size: int, dtype: jnp.dtype, mesh: Mesh | AbstractMesh) -> int:
    """Return the bytes one block id takes in all layers, over all devices."""
    tp, itemsize = meshes.size(mesh), jnp.dtype(dtype).itemsize
    return meshes.copies(mesh) * sum(spec.block_bytes(block_size, itemsize, tp) for spec in specs)


def slot_bytes(specs: Sequence[State], mesh: Mesh | AbstractMesh) -> int:
    """Return the bytes one state slot takes in all recurrent layers, over all devices."""
    return meshes.copies(mesh) * sum(spec.slot_bytes(meshes.size(mesh)) for spec in specs)


def copy_blocks(cache: Cache, sources: jax.Array, targets: jax.Array, *, native: bool = False) -> Cache:
    """Copy block `sources[i]` to `targets[i]` in every cache array; targets >= N are padding and dropped.

    Copies all copy-on-write blocks of a step in one call, before the step writes. No target may also be a source.

    Args:
        cache: the cache arrays.
        sources: block ids to read, `[n]` int32.
        targets: block ids to write, `[n]` int32.
        native: use the native CPU kernel, which handles arrays on a single device.
    """

    def copy(array: jax.Array) -> jax.Array:
        if native:
            return native_attention.copy_blocks(array, sources, targets)
        return array.at[targets].set(array.at[sources].get(mode="clip"), mode="drop")

    return [jax.tree.map(copy, layer) if isinstance(layer, KVCache) else layer for layer in cache]
