"""Multi-head latent attention (arXiv:2405.04434) over the paged cache: what is kept of a token is one latent for all
heads.

A lane is `[N, 1, P, L + R]`: the latent of L columns, then a key of R columns that all heads share (with rotary
positions, where the model has them). Of head h a key is `[U_h c | r]` and a value `W_h c`. So there are two ways to the
same numbers:

- *absorbed*: `q . U c = (U^T q) . c`. The queries go over into the space of latents, which are keys and, in their first
  L columns, values; what is attended goes through W. That is `paged.Lane` with no values of its own, one kv head and
  all heads around it, and every implementation of attention serves it. It reads least: decode.
- *expanded*: keys and values of all heads are made of the latents, each once a step, and attended to as they are: a
  third of the multiplications for each pair of a query and a key. With many queries a sequence: `prefill`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.kernels.attention import paged
from jaxinfer.kernels.attention.paged import Lane, PrefillTiles, Slots
from jaxinfer.kernels.attention.xla_attention import LEAST

KEYS, QUERIES = 128, 64
"""Positions that are expanded at a time, and queries that are scored against them at a time. On a CPU larger ones lose
where sequences are short, smaller ones where they are long."""


class Expansion(NamedTuple):
    """What makes keys and values of latents, of the heads that are here."""

    keys: jax.Array
    """`[H, Dn, L]`: U, of the columns of a key that are not shared."""
    values: jax.Array
    """`[H, Dv, L]`: W."""


def _dot(expression: str, a: jax.Array, b: jax.Array, wide: bool = True) -> jax.Array:
    """The product in float32 (`wide`) or in the operands' dtype."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    kind = jnp.float32 if wide else a.dtype
    return jnp.einsum(expression, a, b, precision=precision, preferred_element_type=kind)


def absorb(q: jax.Array, expansion: Expansion) -> jax.Array:
    """Queries `[T, H, Dn + R]` in the space of latents, `[T, H, L + R]`."""
    own = expansion.keys.shape[1]
    return jnp.concatenate([_dot("thd,hdl->thl", q[..., :own], expansion.keys, wide=False), q[..., own:]], axis=-1)


def release(attended: jax.Array, expansion: Expansion) -> jax.Array:
    """Attended latents `[T, H, L]` as values `[T, H, Dv]`."""
    return _dot("thl,hdl->thd", attended, expansion.values, wide=False)


class _Rows(NamedTuple):
    """The step's tokens by row of the tables, `[B]` each."""

    starts: jax.Array
    positions: jax.Array
    """Of the first token."""
    counts: jax.Array


def _rows(step: PrefillTiles) -> _Rows:
    """Tiles of one row put together again."""
    batch = step.tables.shape[0]
    live = jnp.arange(step.tiles.shape[0]) < step.count
    row, start, position, count = step.tiles.T
    row, far = jnp.where(live, row, batch), jnp.iinfo(jnp.int32).max
    starts, positions = (jnp.full(batch, far).at[row].min(a, mode="drop") for a in (start, position))
    return _Rows(starts, positions, jnp.zeros(batch, count.dtype).at[row].add(count, mode="drop"))


def prefill(
    q: jax.Array, latents: jax.Array, lane: Lane, slots: Slots, step: PrefillTiles, expansion: Expansion, scale: float
) -> tuple[jax.Array, Lane]:
    """Writes the chunk's latents, then attends in the expanded form: causal within each sequence, over all it has
    cached.

    Every latent is expanded once. The online softmax (arXiv:2205.14135) of all queries goes on from one run of keys to
    the next, so that it lies in arrays of the step's size. What is not a number stays in its sequence.

    Args:
        q: `[T, H, Dn + R]`.
        latents: `[T, L + R]`.
        lane: the cache.
        slots: where the latents go.
        step: tables and tiles; tokens of a row lie one after another.
        expansion: of the heads of `q`.
        scale: multiplies the scores.

    Returns:
        `[T, H, Dv]` and the lane; finite for padding.
    """
    lane = paged.write(lane, latents[:, None], None, slots)
    tokens, heads, _ = q.shape
    queries, block = min(QUERIES, tokens), lane.keys.shape[2]
    width = min(max(1, KEYS // block), step.tables.shape[1])
    tables = jnp.pad(step.tables, ((0, 0), (0, width)))
    # By heads: products of matrices then take their operands as they lie.
    padded, rows = jnp.pad(q.swapaxes(0, 1), ((0, 0), (0, queries), (0, 0))), _rows(step)
    turn = partial(_turn, q=padded, expansion=expansion, scale=scale, queries=queries)

    def one_row(row: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        position, length = rows.positions[row], rows.positions[row] + rows.counts[row]

        def keys(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            blocks = jax.lax.dynamic_slice(tables[row], (number * width,), (width,))
            found, first = paged.gather(lane.keys, blocks)[0], number * width * block
            own = (first + jnp.arange(width * block) < length)[:, None]
            place = rows.starts[row], position, length, first
            return turn(jnp.where(own, found, 0), place, carry)

        runs = jnp.where(rows.counts[row] > 0, -(-length // (width * block)), 0)
        return jax.lax.fori_loop(0, runs, keys, carry)

    lead = heads, tokens + queries
    begin = jnp.full(lead, LEAST), jnp.zeros(lead), jnp.zeros((*lead, expansion.values.shape[1]))
    _, total, out = jax.lax.fori_loop(0, tables.shape[0], one_row, begin)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out[:, :tokens].swapaxes(0, 1).astype(q.dtype), lane


def _turn(
    latents: jax.Array,
    place: tuple[jax.Array, ...],
    carry: tuple[jax.Array, ...],
    *,
    q: jax.Array,
    expansion: Expansion,
    scale: float,
    queries: int,
) -> tuple[jax.Array, ...]:
    """Latents `[S, L + R]` of one row, expanded, against all of its queries that see any of them.

    `place`: the row's first token in the step and its position, the row's length, the position of the first latent.
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
        # Queries of the row that follows are no part of this one.
        mine = q_at < length
        kept = (
            jnp.where(mine.reshape(-1, *[1] * (a.ndim - 2)), a, b) for a, b in zip(new, (top, total, out), strict=True)
        )
        return tuple(jax.lax.dynamic_update_slice_in_dim(a, b, here, 1) for a, b in zip(carry, kept, strict=True))

    begin = jnp.maximum(first - position, 0) // queries
    return jax.lax.fori_loop(begin, -(-(length - position) // queries), one, carry)
