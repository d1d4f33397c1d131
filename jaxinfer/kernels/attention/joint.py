"""Attention of a joint step: prefill chunks, and one new token of each of several other sequences at its end.

Each kernel computes what it is made for. Sequences are disjoint, so neither reads what the other one writes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, PrefillTiles, Slots

Attend: TypeAlias = Callable[..., tuple[jax.Array, KVCache]]
"""(arrays by token, cache, slots, rows) -> outputs `[T, ...]`, cache."""


class JointRows(NamedTuple):
    """Tiles of prefill chunks, and D places for decodes: the step's last D tokens, each of which is one or is not."""

    tables: jax.Array
    """Block ids of chunks, then of decodes, `[B, W]`."""
    tiles: jax.Array
    """`[NT, 4]`, as in `PrefillTiles`; none covers a token that is a decode."""
    count: jax.Array
    """Number of tiles, `[]`."""
    spans: jax.Array | None
    """As in `PrefillTiles`."""
    lengths: jax.Array
    """Positions of each decode's sequence, `[D]`, the new one included; 0 for a place that has none."""
    first: int
    """Row of `tables` of the first decode."""
    starts: jax.Array | None = None
    """As in `DecodeRows`."""

    @property
    def chunks(self) -> PrefillTiles:
        """Rows for the kernel of prefill, which gets all tokens."""
        return PrefillTiles(self.tables, self.tiles, self.count, self.spans)

    @property
    def decodes(self) -> DecodeRows:
        """Rows for the kernel of decode, which gets the last D tokens."""
        return DecodeRows(self.tables, self.lengths, self.first, self.starts)


def attend(
    prefill: Attend,
    decode: Attend,
    tokens: tuple[jax.Array | None, ...],
    kv_cache: KVCache,
    slots: Slots | None,
    rows: JointRows,
) -> tuple[jax.Array, KVCache]:
    """Attend by both kernels, to one cache.

    Args:
        prefill, decode: attention of all tokens and of the last ones.
        tokens: arrays `[T, ...]`, such as queries, keys and values.
        kv_cache: cache arrays.
        slots: slots of all tokens.
        rows: tiles and decodes.

    Returns:
        Outputs of all tokens, and the updated cache arrays.
    """
    places = rows.lengths.shape[0]

    def last(arrays: Any) -> Any:
        return jax.tree.map(lambda array: array[-places:], arrays)

    out, kv_cache = prefill(*tokens, kv_cache, slots, rows.chunks)
    own, kv_cache = decode(*last(tokens), kv_cache, last(slots), rows.decodes)
    return at_end(out, own, rows.lengths > 0), kv_cache


def at_end(out: jax.Array, own: jax.Array, decoding: jax.Array) -> jax.Array:
    """Replace the last outputs `[T, ...]` by `own` `[D, ...]` where `decoding` `[D]`."""
    chosen = jnp.where(decoding.reshape(-1, *[1] * (own.ndim - 1)), own, out[-len(own) :])
    return out.at[-len(own) :].set(chosen)
