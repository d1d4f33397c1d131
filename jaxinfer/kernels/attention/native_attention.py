"""Attention over the paged cache on CPUs in C++ (`native/attention.cc`): `decode` and `prefill` as in `xla_attention`.

One kernel serves both: a decode step has tiles of a single query. It reads each live key and value once, directly from
the blocks, and writes the new ones itself. Unsupported cases (float16, odd head dims) fall back to XLA.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer._utils.log import warn_once
from jaxinfer.kernels.attention import paged, xla_attention
from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, PrefillTiles, Scoring, Slots
from jaxinfer.kernels.attention.quantised_cache import SCALE

TILE = 64
"""Queries per prefill tile; 6% faster than 32, where the packing of keys is shared by half as many rows."""


def _served(q: jax.Array, kv_cache: KVCache) -> bool:
    """Return whether the kernel computes these arrays; warn if it does not."""
    if q.dtype not in (jnp.bfloat16, jnp.float32) or not (kv_cache.quantised or kv_cache.keys.dtype == q.dtype):
        reason = f"the CPU kernel computes float32 and bfloat16, not {q.dtype} with a cache of {kv_cache.keys.dtype}"
    elif q.shape[-1] * q.dtype.itemsize % 4:
        reason = f"the CPU kernel computes even head dims in bfloat16, not {q.shape[-1]}"
    else:
        return True
    warn_once("attention runs in XLA, which is slower", reason)
    return False


def decode(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv_cache: KVCache,
    slots: Slots | None,
    step: DecodeRows,
    scoring: Scoring,
    sinks: jax.Array | None = None,
    *,
    items: int | None = None,
) -> tuple[jax.Array, KVCache]:
    """Attend as `xla_attention.decode`; `items` is ignored."""
    if not _served(q, kv_cache):
        return xla_attention.decode(q, k, v, kv_cache, slots, step, scoring, sinks, items=items)
    rows = jnp.arange(q.shape[0], dtype=jnp.int32)
    tiles = jnp.stack([rows + step.first, rows, step.lengths - 1, (step.lengths > 0).astype(jnp.int32)], axis=1)
    spans = None if step.starts is None else jnp.stack([step.starts, step.lengths], axis=1)
    return _call(
        q, k, v, kv_cache, slots, PrefillTiles(step.tables, tiles, jnp.int32(q.shape[0]), spans), scoring, sinks
    )


def prefill(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv_cache: KVCache,
    slots: Slots | None,
    step: PrefillTiles,
    scoring: Scoring,
    sinks: jax.Array | None = None,
    *,
    tile: int,
) -> tuple[jax.Array, KVCache]:
    """Attend as `xla_attention.prefill`."""
    if not _served(q, kv_cache):
        return xla_attention.prefill(q, k, v, kv_cache, slots, step, scoring, sinks, tile=tile)
    return _call(q, k, v, kv_cache, slots, step, scoring, sinks)


def _call(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv_cache: KVCache,
    slots: Slots | None,
    step: PrefillTiles,
    scoring: Scoring,
    sinks: jax.Array | None,
) -> tuple[jax.Array, KVCache]:
    _, heads, _, dim = paged.seen_shape(kv_cache, k)
    value_dim = scoring.value_dim if kv_cache.values is None else (kv_cache.values if v is None else v).shape[-1]
    new = KVCache(None, None) if k is None else paged.as_stored(kv_cache, k, v)
    # The kernel gets empty arrays for those that there are none of.
    dtypes = KVCache(*[kv_cache.keys.dtype] * 2, *[SCALE] * 2)
    given, arrays = (
        [jnp.zeros((0,), dtype) if array is None else array for array, dtype in zip(pair, dtypes, strict=True)]
        for pair in (new, kv_cache)
    )
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    call = jax.ffi.ffi_call(
        "jaxinfer_attention",
        [jax.ShapeDtypeStruct((*q.shape[:2], value_dim), q.dtype), *results],
        input_output_aliases={11 + i: 1 + i for i in range(len(arrays))},
    )
    nowhere = jnp.zeros((0,), jnp.int32)
    slots = Slots(nowhere, nowhere) if slots is None else slots
    integers = (a.astype(jnp.int32) for a in (*slots, step.tables, _spanned(step), step.count))
    out, *written = call(
        q,
        *given,
        *integers,
        jnp.zeros((0,), jnp.float32) if sinks is None else sinks.astype(jnp.float32),
        *arrays,
        scale=np.float32(scoring.scale),
        softcap=np.float32(scoring.softcap or 0),
        window=np.int64(scoring.window or 0),
        chunked=np.int64(scoring.chunked),
        heads=np.int64(heads),
        dim=np.int64(dim),
    )
    return out, KVCache(*(None if old is None else a for old, a in zip(kv_cache, written, strict=True)))


def _spanned(step: PrefillTiles) -> jax.Array:
    """Return the tiles `[NT, 6]`, with the start and end of the keys that any of their queries may see."""
    row, token, position, count = step.tiles.T
    if step.spans is None:
        return jnp.stack([row, token, position, count, jnp.zeros_like(row), position + count], axis=1)
    # A causal query at the position of the last key sees all keys in the span.
    first, end = step.spans.T
    return jnp.stack([row, token, end - 1, count, first, end], axis=1)


def copy_blocks(array: jax.Array, sources: jax.Array, targets: jax.Array) -> jax.Array:
    """Copy block `sources[i]` of `[N, ...]` to `targets[i]` in place; targets >= N are padding and dropped.

    XLA on CPUs may convert a whole bfloat16 array to float32 and back to write a few of its blocks.
    """
    call = jax.ffi.ffi_call(
        "jaxinfer_copy_blocks", jax.ShapeDtypeStruct(array.shape, array.dtype), input_output_aliases={0: 0}
    )
    return call(array, sources.astype(jnp.int32), targets.astype(jnp.int32))
