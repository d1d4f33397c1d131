"""Attention over a paged cache: the plain oracle, and the XLA path for decode and for chunked prefill.

One lane is `[N, K, P, D]`: block, kv head, position in the block, head dim. A block table row lists the
blocks of one sequence in order, so position `s` lies in block `table[s // P]` at offset `s % P`. Positions
that are not part of the sequence are masked on the scores and on the values (0 x NaN is NaN).
All functions see local shapes: under tensor parallelism they run inside `jax.shard_map`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

PREFILL_KEYS = 128
"""Key positions that one step of the prefill's online softmax reads: on a CPU 128 with tiles of 32 queries was
the fastest over prompts of 16 to 512 tokens."""


DECODE_KEYS = 128
"""Key positions of one work item of decode."""


class Lane(NamedTuple):
    """The cache of one layer: keys and values, `[N, K, P, D]` each."""

    keys: jax.Array
    values: jax.Array


class DecodeRows(NamedTuple):
    """One new token a sequence, against everything its table names."""

    tables: jax.Array
    """`[B, W]` block ids; what lies past `lengths` is never used."""
    lengths: jax.Array
    """`[B]` positions each sequence attends to, the new one included; 0 for a padding row."""


class PrefillTiles(NamedTuple):
    """The step's tokens, cut so that a tile of at most `C` queries lies within one sequence."""

    tables: jax.Array
    """`[B, W]` block ids."""
    tiles: jax.Array
    """`[NT, 4]`: row of `tables`, index of the first token in the step, its position, queries in the tile.
    Tiles are in the order of their tokens."""
    count: jax.Array
    """`[]` how many tiles there are."""


def write(lane: Lane, keys: jax.Array, values: jax.Array, blocks: jax.Array, offsets: jax.Array) -> Lane:
    """Puts `[T, K, D]` keys and values at (`blocks[t]`, `offsets[t]`); a block id of N or more is dropped."""
    return Lane(
        lane.keys.at[blocks, :, offsets].set(keys.astype(lane.keys.dtype), mode="drop"),
        lane.values.at[blocks, :, offsets].set(values.astype(lane.values.dtype), mode="drop"),
    )


def _gather(cache: jax.Array, tables: jax.Array) -> jax.Array:
    """`[N, K, P, D]` by `[..., W]` -> `[..., K, W * P, D]`, each (block, head) tile moved as a whole.

    Indexed per (block, head), as rows of a matrix: the fastest of the ways to say it to XLA's CPU gather.
    """
    blocks, heads, positions, dim = cache.shape
    tiles = jnp.arange(heads)[:, None] + jnp.clip(tables, 0, blocks - 1)[..., None, :] * heads
    picked = cache.reshape(blocks * heads, positions * dim).at[tiles].get(mode="promise_in_bounds")
    return picked.reshape(*tables.shape[:-1], heads, tables.shape[-1] * positions, dim)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def item_keys(block: int) -> int:
    """Key positions of one work item of decode: whole blocks, `DECODE_KEYS` or a little less."""
    return max(1, DECODE_KEYS // block) * block


def decode_items(rows: int, longest: int, block: int) -> int:
    """The most work items that `rows` sequences of at most `longest` positions can take."""
    return rows * -(-longest // item_keys(block))


def _decode_work(step: DecodeRows, items: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The step's keys cut into `items` pieces of `item_keys` positions, each of one row.

    Returns the row of each item `[I]` (B where there is none), the position of its first key `[I]`, and its
    blocks `[I, C]`. It is the same for every layer, and compiled once.
    """
    batch, width = step.tables.shape
    span = item_keys(block) // block
    counts = -(-step.lengths // (span * block))
    ends = jnp.cumsum(counts)
    at = jnp.arange(items)
    rows = jnp.searchsorted(ends, at, side="right", method="compare_all").astype(jnp.int32)
    owner = jnp.minimum(rows, batch - 1)
    first = (at - (ends - counts)[owner]) * span
    columns = jnp.clip(first[:, None] + jnp.arange(span), 0, width - 1)
    return rows, first * block, step.tables[owner[:, None], columns]


def decode(q: jax.Array, lane: Lane, step: DecodeRows, scale: float, items: int | None = None) -> jax.Array:
    """Queries `[B, H, D]` -> `[B, H, D]`: softmax(scale q K^T) V over each row's own positions.

    The rows' live keys are cut into pieces of equal size, attended to apart and put together (split-K), so
    that the work follows what is in the cache, not the longest row.

    Args:
        q: one query a row.
        lane: the cache.
        step: tables and lengths.
        scale: multiplies the scores.
        items: pieces there is room for; by default as many as the tables could hold.
    """
    batch, heads, dim = q.shape
    block = lane.keys.shape[2]
    items = items or decode_items(batch, step.tables.shape[1] * block, block)
    rows, starts, blocks = _decode_work(step, items, block)
    keys, values = _gather(lane.keys, blocks), _gather(lane.values, blocks)
    kv_heads, span = keys.shape[1:3]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim).at[rows].get(mode="clip")
    lengths = step.lengths.at[rows].get(mode="fill", fill_value=0)
    live = starts[:, None] + jnp.arange(span) < lengths[:, None]
    precision = _precision(q.dtype)
    scores = scale * jnp.einsum(
        "ikgd,iksd->ikgs", grouped, keys, precision=precision, preferred_element_type=jnp.float32
    )
    scores = jnp.where(live[:, None, None], scores, -jnp.inf)
    mine = rows == jnp.arange(batch)[:, None]
    # Finite, so that a row with nothing to see gives exp(-inf - -1e30) and not NaN.
    top = jnp.where(mine[..., None, None], scores.max(axis=-1), -1e30).max(axis=1)
    weights = jnp.exp(scores - top.at[rows].get(mode="clip")[..., None])
    values = jnp.where(live[:, None, :, None], values, 0)
    parts = jnp.einsum(
        "ikgs,iksd->ikgd", weights.astype(q.dtype), values, precision=precision, preferred_element_type=jnp.float32
    )
    whole = _add_pieces(jnp.concatenate([parts, weights.sum(axis=-1, keepdims=True)], axis=-1), mine)
    return (whole[..., :-1] / jnp.maximum(whole[..., -1:], 1e-30)).reshape(q.shape).astype(q.dtype)


def _add_pieces(parts: jax.Array, mine: jax.Array) -> jax.Array:
    """`[I, K, G, X]` pieces and who owns them `[B, I]` -> their sums `[B, K, G, X]`.

    By a product with ones and zeros, as a scatter-add has no fixed order on a GPU. What is not finite is kept
    out of it, 0 x NaN being NaN, and comes back in its own row only.
    """
    sane = jnp.isfinite(parts).all(axis=(1, 2, 3))
    parts = jnp.where(sane[:, None, None, None], parts, 0)
    whole = jnp.einsum("bi,ikgd->bkgd", mine.astype(jnp.float32), parts, precision=jax.lax.Precision.HIGHEST)
    return jnp.where((mine & ~sane).any(axis=1)[:, None, None, None], jnp.nan, whole)


def prefill(q: jax.Array, lane: Lane, step: PrefillTiles, scale: float, tile: int) -> jax.Array:
    """Queries `[T, H, D]` -> `[T, H, D]`, causal within each sequence and over all it has in the cache.

    An online softmax (arXiv:2205.14135) over the blocks that a tile can see: only live blocks are read, and
    what is read of a sequence's cache is read once a tile of `tile` queries. Rows of padding give finite values
    that nobody reads.
    """
    tokens, heads, dim = q.shape
    kv_heads, block = lane.keys.shape[1], lane.keys.shape[2]
    width = min(max(1, PREFILL_KEYS // block), step.tables.shape[1])
    tables = jnp.pad(step.tables, ((0, 0), (0, width)))
    padded = jnp.pad(q, ((0, tile), (0, 0), (0, 0)))

    def one_tile(index: jax.Array, out: jax.Array) -> jax.Array:
        row, start, position, count = step.tiles[index]
        queries = jax.lax.dynamic_slice(padded, (start, 0, 0), (tile, heads, dim))
        queries = queries.reshape(tile, kv_heads, heads // kv_heads, dim)
        result = _tile(queries, lane, tables[row], position, position + count, scale, width)
        # A tile's tail beyond `count` is overwritten by the tile that follows.
        return jax.lax.dynamic_update_slice(out, result.reshape(tile, heads, dim), (start, 0, 0))

    out = jax.lax.fori_loop(0, step.count, one_tile, jnp.zeros_like(padded))
    return out[:tokens]


def _tile(
    q: jax.Array, lane: Lane, table: jax.Array, position: jax.Array, length: jax.Array, scale: float, width: int
) -> jax.Array:
    """Queries `[C, K, G, D]` at `position`.. against key positions [0, `length`), `width` blocks at a time."""
    count, kv_heads, group, dim = q.shape
    block = lane.keys.shape[2]
    span = width * block
    precision = _precision(q.dtype)
    q_at = position + jnp.arange(count)

    def body(chunk: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        top, total, acc = carry
        blocks = jax.lax.dynamic_slice(table, (chunk * width,), (width,))
        keys, values = _gather(lane.keys, blocks), _gather(lane.values, blocks)
        at = chunk * span + jnp.arange(span)
        scores = scale * jnp.einsum(
            "ckgd,ksd->kgcs", q, keys, precision=precision, preferred_element_type=jnp.float32
        )
        scores = jnp.where((at <= q_at[:, None]) & (at < length), scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        values = jnp.where((at < length)[:, None], values, 0)
        part = jnp.einsum(
            "kgcs,ksd->kgcd", weights.astype(q.dtype), values, precision=precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return new_top, total * shrink + weights.sum(axis=-1), acc * shrink[..., None] + part

    lead = (kv_heads, group, count)
    # Finite, so that a query with nothing to see yet gives exp(-1e30 - -1e30) and not NaN.
    start = (jnp.full(lead, -1e30), jnp.zeros(lead), jnp.zeros((*lead, dim)))
    _, total, acc = jax.lax.fori_loop(0, (length + span - 1) // span, body, start)
    out = acc / jnp.maximum(total, 1e-30)[..., None]
    return jnp.moveaxis(out, 2, 0).astype(q.dtype)


def reference(
    q: jax.Array, lane: Lane, tables: jax.Array, rows: jax.Array, positions: jax.Array, scale: float
) -> jax.Array:
    """The oracle: every token gathers all its sequence's blocks and takes a plain softmax.

    Args:
        q: `[T, H, D]`.
        lane: the cache, the tokens' own keys and values already in it.
        tables: `[B, W]` block ids.
        rows: `[T]` the row of `tables` each token belongs to.
        positions: `[T]` its position; it sees keys 0..position. Negative: padding, gives 0.
        scale: multiplies the scores.
    """
    kv_heads = lane.keys.shape[1]
    keys = jnp.repeat(_gather(lane.keys, tables[rows]), q.shape[1] // kv_heads, axis=1).astype(jnp.float32)
    values = jnp.repeat(_gather(lane.values, tables[rows]), q.shape[1] // kv_heads, axis=1).astype(jnp.float32)
    seen = jnp.arange(keys.shape[2]) <= positions[:, None]
    scores = scale * jnp.einsum("thd,thsd->ths", q.astype(jnp.float32), keys, precision="highest")
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    weights = jnp.where(seen[:, None], weights, 0)
    values = jnp.where(seen[:, None, :, None], values, 0)
    return jnp.einsum("ths,thsd->thd", weights, values, precision="highest").astype(q.dtype)
