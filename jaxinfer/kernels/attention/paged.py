"""The paged cache as kernels see it: lanes, what a step reads of them, how scores are made, and the oracle.

One lane is `[N, K, P, D]`: block, kv head, position in the block, head dim. A block table row lists the
blocks of one sequence in order, so position `s` lies in block `table[s // P]` at offset `s % P`. Positions
that are not part of the sequence are masked on the scores and on the values (0 x NaN is NaN).
All functions see local shapes: under tensor parallelism they run inside `jax.shard_map`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp


class Lane(NamedTuple):
    """The cache of one layer."""

    keys: jax.Array
    """`[N, K, P, D]`."""
    values: jax.Array | None
    """`[N, K, P, Dv]`; None: the values are the first `Scoring.value_dim` columns of the keys (MLA's latent)."""


Cache: TypeAlias = list[Any]
"""All that is kept of all sequences: a `Lane` for each lane, then the arrays of each recurrent layer
(`kernels.state`)."""


class Slots(NamedTuple):
    """Where the tokens of a step are kept."""

    blocks: jax.Array
    """`[T]` the block of each token; N or more for padding, which is written nowhere."""
    offsets: jax.Array
    """`[T]` its position in the block."""


class DecodeRows(NamedTuple):
    """One new token a sequence, against everything its table names."""

    tables: jax.Array
    """`[B, W]` block ids; what lies past `lengths` is never used. Or more rows, see `first`."""
    lengths: jax.Array
    """`[B]` positions each sequence has, the new one included; 0 for a padding row."""
    first: int | jax.Array = 0
    """The row of `tables` that is the first sequence's: the tables of several groups of layers lie in one array."""
    starts: jax.Array | None = None
    """`[B]` where the step keeps nothing: the first key each token sees, of `lengths` that are in the cache; none where
    that is its length."""

    def first_keys(self, scoring: "Scoring") -> jax.Array:
        """`[B]` the first key position that each row sees."""
        return scoring.first_key(self.lengths - 1) if self.starts is None else self.starts


class PrefillTiles(NamedTuple):
    """The step's tokens, cut so that a tile of at most `C` queries lies within one sequence."""

    tables: jax.Array
    """`[B, W]` block ids."""
    tiles: jax.Array
    """`[NT, 4]`: row of `tables`, index of the first token in the step, its position, queries in the tile.
    Tiles are in the order of their tokens."""
    count: jax.Array
    """`[]` how many tiles there are."""
    spans: jax.Array | None = None
    """`[NT, 2]` where the step keeps nothing: the first key and the end of those in the cache that all queries of a
    tile see, whatever its position."""


@dataclass(frozen=True)
class Scoring:
    """How a layer turns queries and keys into weights: static, the same for every step."""

    scale: float
    """Multiplies the scores."""
    window: int | None = None
    """A query at position p sees the keys at (p - window, p]; None: all of [0, p]."""
    softcap: float | None = None
    """Scores x become cap * tanh(x / cap) (Gemma 2, arXiv:2408.00118); None: they stay."""
    value_dim: int | None = None
    """Dv where the lane has no values of its own."""

    def first_key(self, positions: jax.Array) -> jax.Array:
        """The first key position that queries at `positions` see."""
        if self.window is None:
            return jnp.zeros_like(positions)
        return jnp.maximum(positions - self.window + 1, 0)

    def cap(self, scores: jax.Array) -> jax.Array:
        """The scores, capped."""
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)


def write(lane: Lane, keys: jax.Array | None, values: jax.Array | None, slots: Slots | None) -> Lane:
    """Puts `[T, K, D]` keys and `[T, K, Dv]` values into their slots; without keys nothing."""
    if keys is None:
        return lane

    def put(array: jax.Array, new: jax.Array) -> jax.Array:
        return array.at[slots.blocks, :, slots.offsets].set(new.astype(array.dtype), mode="drop")

    return Lane(put(lane.keys, keys), None if lane.values is None else put(lane.values, values))


def gather(cache: jax.Array, tables: jax.Array) -> jax.Array:
    """`[N, K, P, D]` by `[..., W]` -> `[..., K, W * P, D]`, each (block, head) tile moved as a whole.

    Indexed per (block, head), as rows of a matrix: the fastest of the ways to say it to XLA's CPU gather.
    """
    blocks, heads, positions, dim = cache.shape
    tiles = jnp.arange(heads)[:, None] + jnp.clip(tables, 0, blocks - 1)[..., None, :] * heads
    picked = cache.reshape(blocks * heads, positions * dim).at[tiles].get(mode="promise_in_bounds")
    return picked.reshape(*tables.shape[:-1], heads, tables.shape[-1] * positions, dim)


def gather_lane(lane: Lane, tables: jax.Array, scoring: Scoring) -> tuple[jax.Array, jax.Array]:
    """Keys `[..., K, S, D]` and values `[..., K, S, Dv]` of the blocks in `tables` `[..., W]`, S = W * P."""
    keys = gather(lane.keys, tables)
    return keys, keys[..., : scoring.value_dim] if lane.values is None else gather(lane.values, tables)


def reference(
    q: jax.Array,
    lane: Lane,
    tables: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    scoring: Scoring,
    sinks: jax.Array | None = None,
    spans: jax.Array | None = None,
) -> jax.Array:
    """The oracle: every token gathers all its sequence's blocks and takes a plain softmax.

    Args:
        q: `[T, H, D]`.
        lane: the cache, the tokens' own keys and values already in it.
        tables: `[B, W]` block ids.
        rows: `[T]` the row of `tables` each token belongs to.
        positions: `[T]` its position; it sees keys up to it. Negative: padding, gives 0.
        scoring: scale, window, softcap.
        sinks: `[H]` a logit a head that joins the softmax and is dropped (gpt-oss).
        spans: `[T, 2]` the first key and the end of those that each token sees, whatever its position.

    Returns:
        `[T, H, Dv]`.
    """
    keys, values = gather_lane(lane, tables[rows], scoring)
    group = q.shape[1] // keys.shape[1]
    keys, values = (jnp.repeat(a, group, axis=1).astype(jnp.float32) for a in (keys, values))
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
    weights = jax.nn.softmax(scores, axis=-1)[..., : keys.shape[2]]  # NaN where nothing is seen, and then masked
    values = jnp.where(seen[..., None], values, 0)
    return jnp.einsum("ths,thsd->thd", jnp.where(seen, weights, 0), values, precision="highest").astype(q.dtype)
