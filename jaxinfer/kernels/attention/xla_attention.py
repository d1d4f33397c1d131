"""Attention over the paged cache in XLA: used on CPUs without native kernels and on GPUs without Triton."""

import jax
import jax.numpy as jnp

from jaxinfer.kernels.attention import paged
from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, PrefillTiles, Scoring, Slots

PREFILL_KEYS = 128
"""Key positions per step of prefill's online softmax: on a CPU 128 with tiles of 32 queries was fastest for prompts of
16 to 512 tokens."""

TILE = 32
"""Queries per prefill tile; see `PREFILL_KEYS`."""

DECODE_KEYS = 128
"""Key positions per decode work item."""

LEAST = -1e30
"""Initial value of running maxima. Finite, so that a row that sees no key gives exp(-inf - LEAST) = 0 and not NaN."""


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def item_keys(block: int) -> int:
    """Return the key positions per decode work item: whole blocks, at most `DECODE_KEYS` unless a block is larger."""
    return max(1, DECODE_KEYS // block) * block


def decode_items(rows: int, longest: int, block: int) -> int:
    """Return the most work items that `rows` sequences of at most `longest` positions take."""
    return rows * -(-longest // item_keys(block))


def _decode_work(step: DecodeRows, items: int, block: int, scoring: Scoring) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split the keys that a step sees into `items` pieces of `item_keys` positions, each of one row.

    Independent of the layer within a kind, so it is computed once per step.

    Returns:
        Row of each item `[I]` (B for unused items), position of its first key `[I]`, and its blocks `[I, C]`.
    """
    batch, width = step.lengths.shape[0], step.tables.shape[1]
    span = item_keys(block) // block
    skipped = step.first_keys(scoring) // block
    counts = -(-(step.lengths - skipped * block) // (span * block))
    ends = jnp.cumsum(counts)
    at = jnp.arange(items)
    rows = jnp.searchsorted(ends, at, side="right", method="compare_all").astype(jnp.int32)
    owner = jnp.minimum(rows, batch - 1)
    first = skipped[owner] + (at - (ends - counts)[owner]) * span
    columns = jnp.clip(first[:, None] + jnp.arange(span), 0, width - 1)
    return rows, first * block, step.tables[owner[:, None] + step.first, columns]


def decode(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv_cache: KVCache,
    slots: Slots | None,
    step: DecodeRows,
    scoring: Scoring,
    sinks: jax.Array | None = None,
    items: int | None = None,
) -> tuple[jax.Array, KVCache]:
    """Write one new token per row to the cache and attend: softmax(score(q K^T)) V over each row's own positions.

    The rows' live keys are split into pieces of equal size, attended to separately and combined (split-K), so the work
    is proportional to the cached tokens and not to the longest row.

    Args:
        q: `[B, H, D]`.
        k: `[B, K, D]`; None with `step.starts`: nothing is written, all keys are in the cache (cross-attention).
        v: `[B, K, Dv]`; None if the cache has no values.
        kv_cache: the cache arrays.
        slots: where the new tokens are written.
        step: block tables and lengths.
        scoring: scale, window, softcap.
        sinks: `[H]`, see `paged.reference`.
        items: number of pieces there is room for; by default as many as the tables could need.

    Returns:
        `[B, H, Dv]`, 0 for padding, and the updated cache arrays.
    """
    stored = paged.write(kv_cache, k, v, slots)
    kv_cache = stored if k is None else paged.viewed(stored, *k.shape[1:])
    batch, heads, dim = q.shape
    block = kv_cache.keys.shape[2]
    items = items or decode_items(batch, step.tables.shape[1] * block, block)
    if scoring.window is not None:
        # The window, and the part of its first block before it.
        items = min(items, decode_items(batch, scoring.window + block - 1, block))
    rows, starts, blocks = _decode_work(step, items, block, scoring)
    found = paged.gather_kv(kv_cache, blocks, scoring, q.dtype)
    kv_heads, span = found.keys.shape[1:3]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim).at[rows].get(mode="clip")
    lengths = step.lengths.at[rows].get(mode="fill", fill_value=0)[:, None]
    at = starts[:, None] + jnp.arange(span)
    live = (at < lengths) & (at >= step.first_keys(scoring).at[rows].get(mode="fill", fill_value=0)[:, None])
    precision = _precision(q.dtype)
    scores = scoring.scale * jnp.einsum(
        "ikgd,iksd->ikgs", grouped, found.keys, precision=precision, preferred_element_type=jnp.float32
    )
    if kv_cache.quantised:
        scores *= found.key_scales[:, :, None, :, 0]
    scores = jnp.where(live[:, None, None], scoring.cap(scores), -jnp.inf)
    mine = rows == jnp.arange(batch)[:, None]
    top = jnp.where(mine[..., None, None], scores.max(axis=-1), LEAST).max(axis=1)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(kv_heads, -1)
        top = jnp.maximum(top, sinks)
    weights = jnp.exp(scores - top.at[rows].get(mode="clip")[..., None])
    values, of_values = jnp.where(live[:, None, :, None], found.values, 0), weights
    if kv_cache.quantised:
        of_values = weights * jnp.where(live[:, None, None], found.value_scales[:, :, None, :, 0], 0)
    parts = jnp.einsum(
        "ikgs,iksd->ikgd", of_values.astype(q.dtype), values, precision=precision, preferred_element_type=jnp.float32
    )
    whole = _add_pieces(jnp.concatenate([parts, weights.sum(axis=-1, keepdims=True)], axis=-1), mine)
    total = whole[..., -1:] if sinks is None else whole[..., -1:] + jnp.exp(sinks - top)[..., None]
    out = whole[..., :-1] / jnp.maximum(total, 1e-30)
    return out.reshape(batch, heads, -1).astype(q.dtype), stored


def _add_pieces(parts: jax.Array, mine: jax.Array) -> jax.Array:
    """Sum pieces `[I, K, G, X]` by owner (`mine` `[B, I]` bool): `[B, K, G, X]`.

    Uses a matmul with a 0/1 matrix, as scatter-add has no fixed order on a GPU. Non-finite pieces are excluded, since 0
    x NaN is NaN, and make only their own row NaN.
    """
    sane = jnp.isfinite(parts).all(axis=(1, 2, 3))
    parts = jnp.where(sane[:, None, None, None], parts, 0)
    whole = jnp.einsum("bi,ikgd->bkgd", mine.astype(jnp.float32), parts, precision=jax.lax.Precision.HIGHEST)
    return jnp.where((mine & ~sane).any(axis=1)[:, None, None, None], jnp.nan, whole)


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
    """Write the chunk's keys and values and attend, causally over everything cached of each sequence.

    Online softmax (arXiv:2205.14135) over the blocks a tile can see: only live blocks are read, once per tile of `tile`
    queries. Outputs of padding are finite and unused.

    Args:
        q: `[T, H, D]`.
        k: `[T, K, D]`; None with `step.spans`: nothing is written, all keys are in the cache.
        v: `[T, K, Dv]`; None if the cache has no values.
        kv_cache: the cache arrays.
        slots: where the tokens are written.
        step: block tables and tiles.
        scoring: scale, window, softcap.
        sinks: `[H]`, see `paged.reference`.
        tile: maximum queries per tile.

    Returns:
        `[T, H, Dv]` and the updated cache arrays.
    """
    stored = paged.write(kv_cache, k, v, slots)
    kv_cache = stored if k is None else paged.viewed(stored, *k.shape[1:])
    tokens, heads, dim = q.shape
    kv_heads, block = kv_cache.keys.shape[1], kv_cache.keys.shape[2]
    value_dim = scoring.value_dim if kv_cache.values is None else kv_cache.values.shape[3]
    width = min(max(1, PREFILL_KEYS // block), step.tables.shape[1])
    tables = jnp.pad(step.tables, ((0, 0), (0, width)))
    padded = jnp.pad(q, ((0, tile), (0, 0), (0, 0)))
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(kv_heads, -1)

    def one_tile(index: jax.Array, out: jax.Array) -> jax.Array:
        row, start, position, count = step.tiles[index]
        queries = jax.lax.dynamic_slice(padded, (start, 0, 0), (tile, heads, dim))
        queries = queries.reshape(tile, kv_heads, heads // kv_heads, dim)
        q_at = position + jnp.arange(tile)
        span = (scoring.first_key(q_at), q_at, position + count)
        if step.spans is not None:
            first, end = step.spans[index]
            span = (jnp.full(tile, first), jnp.full(tile, end - 1), end)
        result = _tile(queries, kv_cache, tables[row], span, scoring, sinks, width)
        # The next tile overwrites this tile's output beyond `count`.
        return jax.lax.dynamic_update_slice(out, result.reshape(tile, heads, value_dim), (start, 0, 0))

    empty = jnp.zeros((*padded.shape[:2], value_dim), q.dtype)
    return jax.lax.fori_loop(0, step.count, one_tile, empty)[:tokens], stored


def _tile(
    q: jax.Array,
    kv_cache: KVCache,
    table: jax.Array,
    span: tuple[jax.Array, jax.Array, jax.Array],
    scoring: Scoring,
    sinks: jax.Array | None,
    width: int,
) -> jax.Array:
    """Attend with queries `[C, K, G, D]` to the keys they see, `width` blocks at a time.

    `span` holds the first and last key position each query sees `[C]`, and the end of all keys.
    """
    count, kv_heads, group, dim = q.shape
    least, q_at, length = span[0][:, None], span[1][:, None], span[2]
    keys_read = width * kv_cache.keys.shape[2]
    precision = _precision(q.dtype)

    def body(chunk: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        top, total, acc = carry
        blocks = jax.lax.dynamic_slice(table, (chunk * width,), (width,))
        found = paged.gather_kv(kv_cache, blocks, scoring, q.dtype)
        at = chunk * keys_read + jnp.arange(keys_read)
        scores = scoring.scale * jnp.einsum(
            "ckgd,ksd->kgcs", q, found.keys, precision=precision, preferred_element_type=jnp.float32
        )
        if kv_cache.quantised:
            scores *= found.key_scales[:, None, None, :, 0]
        scores = jnp.where((at <= q_at) & (at >= least) & (at < length), scoring.cap(scores), -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        live, of_values = (at >= least[0]) & (at < length), weights
        values = jnp.where(live[:, None], found.values, 0)
        if kv_cache.quantised:
            of_values = weights * jnp.where(live, found.value_scales[:, None, None, :, 0], 0)
        part = jnp.einsum(
            "kgcs,ksd->kgcd",
            of_values.astype(q.dtype),
            values,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return new_top, total * shrink + weights.sum(axis=-1), acc * shrink[..., None] + part

    lead = (kv_heads, group, count)
    value_dim = scoring.value_dim if kv_cache.values is None else kv_cache.values.shape[3]
    top, total = jnp.full(lead, LEAST), jnp.zeros(lead)
    if sinks is not None:
        top, total = jnp.broadcast_to(sinks[..., None], lead), jnp.ones(lead)
    start = (top, total, jnp.zeros((*lead, value_dim)))
    first = span[0][0] // keys_read
    _, total, acc = jax.lax.fori_loop(first, (length + keys_read - 1) // keys_read, body, start)
    out = acc / jnp.maximum(total, 1e-30)[..., None]
    return jnp.moveaxis(out, 2, 0).astype(q.dtype)
