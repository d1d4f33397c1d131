"""Multi-head latent attention (MLA, arXiv:2405.04434) over a paged cache of one latent per token, shared by all heads.

The cache array is `[N, 1, P, L + R]`: a latent c of L columns and a key r of R columns shared by all heads (rotated in
models with rope). Head h has keys `[U_h c | r]` and values `W_h c`. Two computations give the same result:

- *absorbed*: `q . U c = (U^T q) . c`. Queries are projected to the latent space, where latents are the keys and, in
  their first L columns, the values; outputs are projected with W. This is a `paged.KVCache` without values, with one kv
  head shared by all heads, so every attention implementation supports it. It reads the fewest bytes, and is used for
  decode.
- *expanded*: keys and values of all heads are computed from the latents, once per step, and attended to directly, with
  a third of the multiplications per query-key pair. Used by `prefill`, with many queries per sequence.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.kernels.attention import paged
from jaxinfer.kernels.attention.paged import KVCache, PrefillTiles, Slots
from jaxinfer.kernels.attention.xla_attention import LEAST

KEYS, QUERIES = 128, 64
"""Positions expanded at a time, and queries scored against them at a time. On a CPU larger values are slower for short
sequences, smaller ones for long sequences."""


class Expansion(NamedTuple):
    """Up-projections from latents to keys and values, for the local heads."""

    keys: jax.Array
    """U `[H, Dn, L]`, for the unshared columns of keys."""
    values: jax.Array
    """W `[H, Dv, L]`."""


def _dot(expression: str, a: jax.Array, b: jax.Array, wide: bool = True) -> jax.Array:
    """Compute an einsum in float32 (`wide`) or in the operands' dtype."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    kind = jnp.float32 if wide else a.dtype
    return jnp.einsum(expression, a, b, precision=precision, preferred_element_type=kind)


def absorb(q: jax.Array, expansion: Expansion) -> jax.Array:
    """Project queries `[T, H, Dn + R]` to the latent space: `[T, H, L + R]`."""
    own = expansion.keys.shape[1]
    return jnp.concatenate([_dot("thd,hdl->thl", q[..., :own], expansion.keys, wide=False), q[..., own:]], axis=-1)


def release(attended: jax.Array, expansion: Expansion) -> jax.Array:
    """Project attended latents `[T, H, L]` to values `[T, H, Dv]`."""
    return _dot("thl,hdl->thd", attended, expansion.values, wide=False)


class _Rows(NamedTuple):
    """Tokens of the step by row of the block tables, `[B]` each."""

    starts: jax.Array
    positions: jax.Array
    """Position of the first token."""
    counts: jax.Array


def _rows(step: PrefillTiles) -> _Rows:
    """Merge the tiles of each row."""
    batch = step.tables.shape[0]
    live = jnp.arange(step.tiles.shape[0]) < step.count
    row, start, position, count = step.tiles.T
    row, far = jnp.where(live, row, batch), jnp.iinfo(jnp.int32).max
    starts, positions = (jnp.full(batch, far).at[row].min(a, mode="drop") for a in (start, position))
    return _Rows(starts, positions, jnp.zeros(batch, count.dtype).at[row].add(count, mode="drop"))


def prefill(
    q: jax.Array,
    latents: jax.Array,
    kv_cache: KVCache,
    slots: Slots,
    step: PrefillTiles,
    expansion: Expansion,
    scale: float,
) -> tuple[jax.Array, KVCache]:
    """Write the chunk's latents and attend in expanded form, causally over everything cached of each sequence.

    Each latent is expanded once. The online softmax (arXiv:2205.14135) of all queries is carried from one run of keys
    to the next, in arrays of the step's size. NaN stays within its sequence.

    Args:
        q: `[T, H, Dn + R]`.
        latents: `[T, L + R]`.
        kv_cache: the cache array.
        slots: where the latents are written.
        step: block tables and tiles; tokens of a row are contiguous.
        expansion: up-projections of the heads of `q`.
        scale: multiplies the scores.

    Returns:
        `[T, H, Dv]`, finite for padding, and the updated cache array.
    """
    kv_cache = paged.write(kv_cache, latents[:, None], None, slots)
    tokens, heads, _ = q.shape
    queries, block = min(QUERIES, tokens), kv_cache.keys.shape[2]
    width = min(max(1, KEYS // block), step.tables.shape[1])
    tables = jnp.pad(step.tables, ((0, 0), (0, width)))
    # Heads first: matmuls can then use their operands without transposing.
    padded, rows = jnp.pad(q.swapaxes(0, 1), ((0, 0), (0, queries), (0, 0))), _rows(step)
    attend_chunk = partial(_attend_chunk, q=padded, expansion=expansion, scale=scale, queries=queries)

    def one_row(row: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        position, length = rows.positions[row], rows.positions[row] + rows.counts[row]

        def keys(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            blocks = jax.lax.dynamic_slice(tables[row], (number * width,), (width,))
            found, first = paged.gather_latents(kv_cache, blocks, q.dtype), number * width * block
            own = (first + jnp.arange(width * block) < length)[:, None]
            place = rows.starts[row], position, length, first
            return attend_chunk(jnp.where(own, found, 0), place, carry)

        runs = jnp.where(rows.counts[row] > 0, -(-length // (width * block)), 0)
        return jax.lax.fori_loop(0, runs, keys, carry)

    lead = heads, tokens + queries
    begin = jnp.full(lead, LEAST), jnp.zeros(lead), jnp.zeros((*lead, expansion.values.shape[1]))
    _, total, out = jax.lax.fori_loop(0, tables.shape[0], one_row, begin)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out[:, :tokens].swapaxes(0, 1).astype(q.dtype), kv_cache


def _attend_chunk(
    latents: jax.Array,
    place: tuple[jax.Array, ...],
    carry: tuple[jax.Array, ...],
    *,
    q: jax.Array,
    expansion: Expansion,
    scale: float,
    queries: int,
) -> tuple[jax.Array, ...]:
    """Expand latents `[S, L + R]` of one row and attend to them with all of the row's queries that see any of them.

    `place` holds the row's first token in the step, its position, the row's length, and the position of the first
    latent.
    """
    start, position, length, first = place
    rank = expansion.keys.shape[2]
    keys = _dot("sl,hdl->hsd", latents[:, :rank], expansion.keys, wide=False)
    values = _dot("sl,hdl->hsd", latents[:, :rank], expansion.values, wide=False)
    shared = jnp.broadcast_to(latents[:, rank:], (keys.shape[0], *latents[:, rank:].shape))
    keys = jnp.concatenate([keys, shared], axis=-1)
    at = first + jnp.arange(latents.shape[0])

    def one(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        here = start + number * queries
        part = jax.lax.dynamic_slice_in_dim(q, here, queries, axis=1)
        scores = _dot("hcd,hsd->hcs", part, keys)
        q_at = position + number * queries + jnp.arange(queries)
        seen = (at <= q_at[:, None]) & (q_at < length)[:, None]
        scores = jnp.where(seen, scale * scores, -jnp.inf)
        top, total, out = (jax.lax.dynamic_slice_in_dim(a, here, queries, axis=1) for a in carry)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        new_out = out * shrink[..., None] + _dot("hcs,hsd->hcd", weights.astype(values.dtype), values)
        new = new_top, total * shrink + weights.sum(axis=-1), new_out
        # A slice may extend into the queries of the next row: keep their values.
        mine = q_at < length
        kept = (
            jnp.where(mine.reshape(-1, *[1] * (a.ndim - 2)), a, b) for a, b in zip(new, (top, total, out), strict=True)
        )
        return tuple(jax.lax.dynamic_update_slice_in_dim(a, b, here, 1) for a, b in zip(carry, kept, strict=True))

    begin = jnp.maximum(first - position, 0) // queries
    return jax.lax.fori_loop(begin, -(-(length - position) // queries), one, carry)
