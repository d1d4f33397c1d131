"""Types of paged attention shared by all implementations, and the reference implementation.

A cache array is `[N, K, P, D]`: block, kv head, position in the block, head dim. A row of the block table lists the
blocks of one sequence in order, so position `s` is in block `table[s // P]` at offset `s % P`. Positions outside the
sequence are masked on scores and on values (0 x NaN is NaN). All functions take local shapes: under tensor parallelism
they run inside `jax.shard_map`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxinfer.kernels.attention.quantised_cache import FLOAT32, Codes, dequantise, quantise, widen


class KVCache(NamedTuple):
    """Pair of cache arrays; layers of different groups may share it (`kv.groups`)."""

    keys: jax.Array
    """`[N, K, P, D]`."""
    values: jax.Array | None
    """`[N, K, P, Dv]`; None if the values are the first `Scoring.value_dim` columns of the keys (MLA)."""
    key_scales: jax.Array | None = None
    """`[N, K, P, 1]` if the keys are codes (`quantised_cache`), else None."""
    value_scales: jax.Array | None = None
    """Likewise; None without values, which have the scales of the keys then."""

    @property
    def quantised(self) -> bool:
        """Whether keys and values are codes with scales."""
        return self.key_scales is not None


Cache: TypeAlias = list[Any]
"""Cache of all sequences: one `KVCache` per pair of arrays, then arrays of each recurrent layer (`kernels.state`)."""


class Slots(NamedTuple):
    """Cache slots that the tokens of a step are written to."""

    blocks: jax.Array
    """Block of each token, `[T]`; N or more for padding, whose writes are dropped."""
    offsets: jax.Array
    """Position of each token in its block, `[T]`."""


class DecodeRows(NamedTuple):
    """One new token per sequence, attending to all blocks of its table."""

    tables: jax.Array
    """Block ids `[B, W]`; entries beyond `lengths` are ignored. May have more rows, see `first`."""
    lengths: jax.Array
    """Positions of each sequence, `[B]`, the new one included; 0 for padding rows."""
    first: int | jax.Array = 0
    """Row of `tables` of the first sequence, as the tables of several groups are in one array."""
    starts: jax.Array | None = None
    """First key position each token sees, `[B]`, of the `lengths` in the cache, for steps that write nothing
    (cross-attention); equal to the length if it sees none. None for causal attention."""

    def first_keys(self, scoring: "Scoring") -> jax.Array:
        """Return the first key position that each row sees, `[B]`."""
        return scoring.first_key(self.lengths - 1) if self.starts is None else self.starts


class PrefillTiles(NamedTuple):
    """Tokens of a step cut into tiles of at most `C` queries of one sequence."""

    tables: jax.Array
    """Block ids, `[B, W]`."""
    tiles: jax.Array
    """`[NT, 4]`: row of `tables`, index of the first token in the step, its position, queries in the tile. Tiles are in
    token order."""
    count: jax.Array
    """Number of tiles, `[]`."""
    spans: jax.Array | None = None
    """Start and end of the keys that all queries of a tile see, `[NT, 2]`, for steps that write nothing (bidirectional
    or cross-attention). None for causal attention."""


@dataclass(frozen=True)
class Scoring:
    """How a layer computes attention weights from queries and keys; static, the same for every step."""

    scale: float
    """Multiplies the scores."""
    window: int | None = None
    """Sliding window: a query at position p sees keys at (p - window, p]; None for [0, p]."""
    softcap: float | None = None
    """Maps scores x to cap * tanh(x / cap) (Gemma 2, arXiv:2408.00118); None for no softcap."""
    value_dim: int | None = None
    """Dv for caches without values (MLA)."""
    chunked: bool = False
    """Whether the window does not slide but is one of chunks side by side: p sees [p - p % window, p] (Llama 4)."""

    def first_key(self, positions: jax.Array) -> jax.Array:
        """Return the first key position that queries at `positions` see."""
        if self.window is None:
            return jnp.zeros_like(positions)
        first = positions - positions % self.window if self.chunked else positions - self.window + 1
        return jnp.maximum(first, 0)

    def cap(self, scores: jax.Array) -> jax.Array:
        """Apply the softcap to scores."""
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)


def seen_shape(kv_cache: KVCache, k: jax.Array | None) -> tuple[int, int, int, int]:
    """Return the shape `[N, K, P, D]` in which a layer with keys `[T, K, D]` sees the arrays; without, their own.

    Several layers lie side by side in a block if each has an n-th of its elements (`kv.groups`); the arrays have the
    narrowest heads. Kernels compute addresses with this shape: XLA would copy an array that it reshapes and a kernel
    then writes.
    """
    blocks, heads, block, dim = kv_cache.keys.shape
    if k is None or k.shape[1:] == (heads, dim):
        return blocks, heads, block, dim
    return blocks * heads * dim // (k.shape[1] * k.shape[2]), k.shape[1], block, k.shape[2]


def viewed(kv_cache: KVCache, kv_heads: int, head_dim: int) -> KVCache:
    """See cache arrays in the shape of a layer with other heads (`seen_shape`), to read them.

    Heads n times as wide as the arrays' have room for n scales, `[N, K, P, n]`, and use the first.
    """
    if kv_cache.keys.shape[1::2] == (kv_heads, head_dim):
        return kv_cache
    block, dim = kv_cache.keys.shape[2:]
    return jax.tree.map(lambda array: array.reshape(-1, kv_heads, block, array.shape[3] * head_dim // dim), kv_cache)


def as_stored(kv_cache: KVCache, keys: jax.Array, values: jax.Array | None) -> KVCache:
    """Return new keys `[T, K, D]` and values `[T, K, Dv]` as the cache stores them: cast, or as codes with scales."""
    kind = kv_cache.keys.dtype
    if not kv_cache.quantised:
        return KVCache(keys.astype(kind), None if values is None else values.astype(kind))
    (codes, scales), own = quantise(keys, kind), Codes(None, None) if values is None else quantise(values, kind)
    return KVCache(codes, own.codes, scales, own.scales)


def write(kv_cache: KVCache, keys: jax.Array | None, values: jax.Array | None, slots: Slots | None) -> KVCache:
    """Write keys `[T, K, D]` and values `[T, K, Dv]` to their slots; without keys the cache is unchanged."""
    if keys is None:
        return kv_cache

    same = keys.shape[1:] == kv_cache.keys.shape[1::2]
    wide = keys.shape[2] // kv_cache.keys.shape[3]

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        if same:
            return array.at[slots.blocks, :, slots.offsets].set(new, mode="drop")
        # In the shape that the array has, or XLA would copy all of it: a wide head is several rows there.
        _, heads, block, dim = array.shape
        rows = new.reshape(*new.shape[:2], -1, dim)
        place = (slots.blocks[:, None] * new.shape[1] + jnp.arange(new.shape[1])) * block + slots.offsets[:, None]
        place = place[..., None] * wide + jnp.arange(rows.shape[2])
        return array.at[place // (heads * block), place // block % heads, place % block].set(rows, mode="drop")

    return jax.tree.map(put, kv_cache, as_stored(kv_cache, keys, values))


def gather(cache: jax.Array, tables: jax.Array) -> jax.Array:
    """Gather blocks of `[N, K, P, D]` by tables `[..., W]` into `[..., K, W * P, D]`, moving each (block, head) tile as
    a whole.

    Indexes (block, head) pairs as matrix rows, which is the fastest formulation for XLA's CPU gather.
    """
    blocks, heads, positions, dim = cache.shape
    tiles = jnp.arange(heads)[:, None] + jnp.clip(tables, 0, blocks - 1)[..., None, :] * heads
    picked = cache.reshape(blocks * heads, positions * dim).at[tiles].get(mode="promise_in_bounds")
    return picked.reshape(*tables.shape[:-1], heads, tables.shape[-1] * positions, dim)


def gather_kv(kv_cache: KVCache, tables: jax.Array, scoring: Scoring, dtype: jnp.dtype) -> KVCache:
    """Gather keys `[..., K, S, D]`, values `[..., K, S, Dv]` and their scales `[..., K, S, 1]` by tables `[..., W]`.

    S = W * P. Keys and values, or their codes, are converted to `dtype` and scales to float32. Without values, those of
    the keys are returned.
    """

    def found(array: jax.Array | None, dtype: jnp.dtype) -> jax.Array | None:
        return None if array is None else widen(gather(array, tables), dtype)

    def scales_of(array: jax.Array | None) -> jax.Array | None:
        return None if array is None else found(array, FLOAT32)[..., :1]

    keys, scales = found(kv_cache.keys, dtype), scales_of(kv_cache.key_scales)
    if kv_cache.values is None:
        return KVCache(keys, keys[..., : scoring.value_dim], scales, scales)
    return KVCache(keys, found(kv_cache.values, dtype), scales, scales_of(kv_cache.value_scales))


def gather_latents(kv_cache: KVCache, tables: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Gather and dequantise the keys `[S, D]` of the only kv head of the blocks in `tables` `[W]`, S = W * P (MLA)."""
    scales = None if kv_cache.key_scales is None else gather(kv_cache.key_scales, tables)[0]
    return dequantise(gather(kv_cache.keys, tables)[0], scales, dtype)


def reference(
    q: jax.Array,
    kv_cache: KVCache,
    tables: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    scoring: Scoring,
    sinks: jax.Array | None = None,
    spans: jax.Array | None = None,
) -> jax.Array:
    """Compute paged attention without tiling: every token gathers all blocks of its sequence for a plain softmax.

    Args:
        q: `[T, H, D]`.
        kv_cache: the cache, which already holds the tokens' own keys and values.
        tables: block ids `[B, W]`.
        rows: row of `tables` of each token, `[T]`.
        positions: position of each token, `[T]`; it sees keys up to it. Negative for padding, whose output is 0.
        scoring: scale, window, softcap.
        sinks: attention sink logit per head, `[H]`: takes part in the softmax without a value (gpt-oss).
        spans: start and end of the keys each token sees, `[T, 2]`, instead of a causal mask.

    Returns:
        `[T, H, Dv]`.
    """
    found = gather_kv(kv_cache, tables[rows], scoring, FLOAT32)
    keys, values = dequantise(found.keys, found.key_scales), dequantise(found.values, found.value_scales)
    group = q.shape[1] // keys.shape[1]
    keys, values = (jnp.repeat(a, group, axis=1) for a in (keys, values))
    at, last = jnp.arange(keys.shape[2]), positions[:, None]
    if spans is None:
        seen = ((at <= last) & (at >= scoring.first_key(last)))[:, None]
    else:
        seen = ((at >= spans[:, :1]) & (at < spans[:, 1:]))[:, None]
    scores = jnp.einsum("thd,thsd->ths", q.astype(jnp.float32), keys, precision="highest")
    scores = jnp.where(seen, scoring.cap(scoring.scale * scores), -jnp.inf)
    if sinks is not None:
        extra = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None], (*scores.shape[:2], 1))
        scores = jnp.concatenate([scores, extra], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : keys.shape[2]]  # NaN for tokens that see no key, masked below
    values = jnp.where(seen[..., None], values, 0)
    return jnp.einsum("ths,thsd->thd", jnp.where(seen, weights, 0), values, precision="highest").astype(q.dtype)
