"""Bidirectional attention within each input of an encoder, whose keys and values are not cached.

Axes beside those of `sharding.axes`: n inputs, t tokens of an input.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.attention.paged import KVCache, PrefillTiles, Scoring
from jaxinfer.kernels.attention.triton_attention import TritonAttention
from jaxinfer.kernels.triton import triton_tiles

QUERIES = 1024
"""XLA: queries scored at a time for inputs with more than twice as many tokens, whose full scores take gigabytes."""
MARK = 1024.0
"""Triton: value of the columns that mask padding; it makes a masked score millions smaller than the others."""
COLUMNS = 8
"""Triton: columns added to queries and keys for padding; rows stay multiples of 16 bytes."""


def attend_spans(
    kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, rows: PrefillTiles, scoring: Scoring, *, tile: int
) -> jax.Array:
    """Attend to spans of keys with the `prefill` of a paged kernel, in which each position is a block.

    Nothing is copied, no scores are materialised, and the work is proportional to the spans.

    Args:
        kernel: implementation (`choose.implementation`).
        q: `[S, H, D]`.
        k: `[S, H, D]`.
        v: `[S, H, Dv]`.
        rows: tiles of queries and the keys that each sees; `tables` list positions.
        scoring: scale.
        tile: most queries of a tile.

    Returns:
        `[S, H, Dv]`; finite at padding.
    """
    return kernel.prefill(q, None, None, KVCache(k[:, :, None], v[:, :, None]), None, rows, scoring, tile=tile)[0]


def attend_whole(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    padding: jax.Array | None = None,
    *,
    triton: TritonAttention | None = None,
    unrolled: bool = False,
) -> jax.Array:
    """Attend among all tokens of an input, with a float32 softmax: q, k and v `[n, t, H, D]` -> `[n, t, H, D]`.

    Args:
        q: queries.
        k: keys.
        v: values.
        padding: `[n, t]` bool; padding tokens attend to all tokens but padding. Each input has a token that is not
            padding.
        triton: the kernel to use; None for XLA, which writes the scores of `QUERIES` queries to memory.
        unrolled: whether XLA computes the pieces without a loop, which on a GPU is controlled by the host. On a CPU
            the loop is used, as without it jax 0.10 keeps the scores of all pieces at once.
    """
    if triton is not None:
        return _attend_triton(triton, q, k, v, padding)
    count, tokens = q.shape[:2]
    if tokens <= 2 * QUERIES:
        return _attend(q, k, v, padding, padding)
    filled = -tokens % QUERIES

    def pieces(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        x = jnp.pad(x, ((0, 0), (0, filled), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(count, -1, QUERIES, *x.shape[2:]).swapaxes(0, 1)

    mapped = _unrolled if unrolled else jax.lax.map
    out = mapped(lambda piece: _attend(piece[0], k, v, piece[1], padding), (pieces(q), pieces(padding)))
    return out.swapaxes(0, 1).reshape(count, tokens + filled, *out.shape[3:])[:, :tokens]


def _unrolled(function: Callable[[Any], jax.Array], pieces: Any) -> jax.Array:
    """Compute `jax.lax.map` without a loop; each piece waits for the one before, so that their temporaries share
    memory."""
    made: list[jax.Array] = []
    for at in range(len(jax.tree.leaves(pieces)[0])):
        piece = jax.tree.map(lambda x, at=at: x[at], pieces)
        if made:
            piece, made[-1] = jax.lax.optimization_barrier((piece, made[-1]))
        made.append(function(piece))
    return jnp.stack(made)


def _attend_triton(
    kernel: TritonAttention, q: jax.Array, k: jax.Array, v: jax.Array, padding: jax.Array | None
) -> jax.Array:
    """Attend in the paged kernel.

    The mask of pairs of padding tokens has rank one: a column of queries times a column of keys. So it costs columns
    instead of an array of `[n, t, t]`, and adds exactly 0 to all other scores.
    """
    count, tokens, heads, dim = q.shape
    scoring = Scoring(dim**-0.5)
    if padding is not None:
        mark = jnp.where(padding, MARK, 0.0).astype(q.dtype)[:, :, None, None]
        mark = jnp.pad(mark, ((0, 0), (0, 0), (0, 0), (0, COLUMNS - 1)))
        mark = jnp.broadcast_to(mark, (count, tokens, heads, COLUMNS))
        q, k = jnp.concatenate([q, mark], axis=-1), jnp.concatenate([k, -mark], axis=-1)
    tile = triton_tiles.tile(1, dim, q.dtype.itemsize)
    first = np.arange(0, tokens, tile)
    row, first = np.repeat(np.arange(count), len(first)), np.tile(first, count)
    tiles = np.stack([row, row * tokens + first, first, np.minimum(tile, tokens - first)], axis=1)
    spans = np.broadcast_to(np.array([0, tokens]), (len(tiles), 2))
    tables = jnp.arange(count * tokens, dtype=jnp.int32).reshape(count, tokens)
    whole = jnp.asarray(tiles, jnp.int32), jnp.int32(len(tiles)), jnp.asarray(spans, jnp.int32)
    q, k, v = (x.reshape(-1, heads, x.shape[-1]) for x in (q, k, v))
    return attend_spans(kernel, q, k, v, PrefillTiles(tables, *whole), scoring, tile=tile).reshape(
        count, tokens, heads, -1
    )


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, of_queries: jax.Array | None, of_keys: jax.Array | None
) -> jax.Array:
    """Attend for some queries `[n, q, H, D]`, with padding masks of these and of the keys."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    if of_keys is not None:
        scores = jnp.where((of_queries[:, :, None] & of_keys[:, None])[:, None], -jnp.inf, scores)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("nhqk,nkhd->nqhd", weights, v, precision=precision)
