"""Arguments of one step: `DecodeBatch` has one token per sequence, `PrefillBatch` has chunks of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxinfer.kernels.attention.xla_attention import TILE
from jaxinfer.kernels.state.slots import DecodeSlots, Segments

Array: TypeAlias = Any
"""A NumPy array on the host, a tracer under jit, or a shape before compilation."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "positions", "tables", "seen", "states", "adapters", "rope_positions"],
    meta_fields=["items"],
)
@dataclass(frozen=True)
class DecodeBatch:
    """One new token per sequence."""

    tokens: Array
    """Last token of each sequence, `[B]`; its keys and values are not in the cache yet."""
    positions: Array
    """Position of each token, `[B]`; -1 for a padding row."""
    tables: Array
    """Block tables `[B, W]`; `[G, B, W]` for a model with G groups of layers."""
    items: int | None = None
    """Static: number of work items (pieces of the rows' keys) that attention has room for
    (`kernels.attention.xla_attention.decode_items`); by default as many as the tables could hold.
    """
    seen: Array | None = None
    """With cross-attention: first and end of the encoder positions visible to each token, `[B, 2]`."""
    states: DecodeSlots | None = None
    """With recurrent layers: state slot of each sequence."""
    adapters: Array | None = None
    """With adapters: slot of each sequence's adapter, `[B]`; -1 for none (`layers.adapters`)."""
    rope_positions: Array | None = None
    """With M-RoPE: position that rope rotates each token by, `[B]`; None if it is `positions`."""


@partial(
    jax.tree_util.register_dataclass,
    meta_fields=["tile"],
    data_fields=[
        *("tokens", "positions", "rows", "rope_lengths", "tables", "tiles", "count", "last"),
        *("seen", "states", "adapters", "rope_positions", "lengths"),
    ],
)
@dataclass(frozen=True)
class PrefillBatch:
    """Prefill chunks of one or more sequences, concatenated."""

    tokens: Array
    """Token ids, `[T]`."""
    positions: Array
    """Position of each token in its sequence, `[T]`; -1 for padding."""
    rows: Array
    """Row of `tables` that each token belongs to, `[T]`."""
    rope_lengths: Array
    """Sequence length that rope frequencies are computed for, `[T]`: the prompt's length for prompt tokens, position
    + 1 after.
    """
    tables: Array
    """Block tables `[B, W]`; `[G, B, W]` for a model with G groups of layers."""
    tiles: Array
    """Attention tiles, `[NT, 4]`; see `PrefillTiles`."""
    count: Array
    """Number of tiles in use, `[]`."""
    last: Array
    """Indices of the tokens whose logits are needed, `[S]`."""
    tile: int = TILE
    """Static: maximum number of queries in a tile."""
    seen: Array | None = None
    """With cross-attention: first and end of the encoder positions visible to each token, `[T, 2]`, equal within a
    tile.
    """
    states: Segments | None = None
    """With recurrent layers: slots that segments of the tokens start from and store their states to."""
    adapters: Array | None = None
    """With adapters: slot of each token's adapter, `[T]`; -1 for none (`layers.adapters`)."""
    rope_positions: Array | None = None
    """With M-RoPE: positions that rope rotates each token by, `[T, 3]` (`media.rope_positions`); None if all are
    `positions`.
    """
    lengths: Array | None = None
    """In a joint step: for each of the last D tokens the length of its sequence, `[D]`, if it is a decode, and 0 if it
    is not. Decodes are in no tile, and `rows` says that their tables are the last D ones, in this order.
    """


def prefill_batch(
    chunks: Sequence[tuple[Any, int, int]],
    tables: Any,
    *,
    tokens: int | None = None,
    rows: int | None = None,
    samples: np.ndarray | None = None,
    tile: int = TILE,
    seen: np.ndarray | None = None,
    rope_positions: np.ndarray | None = None,
) -> PrefillBatch:
    """Concatenate prefill chunks of sequences into a batch, in NumPy.

    Args:
        chunks: per sequence: its token ids in this step, the position of the first of them, and the length of its
            prompt (which is longer than the chunk if the prompt is split).
        tables: block ids, `[len(chunks), W]` or `[G, len(chunks), W]`.
        tokens: T to pad to; by default the chunks' total number of tokens.
        rows: B to pad to, and the length of `last`.
        samples: index of the chunk of each needed logit, `[S]`; by default every chunk once.
        tile: maximum number of queries in a tile; `Program.tile` is best for the program's devices.
        seen: with cross-attention, visible encoder positions of all tokens of the chunks, `[., 2]`. Where it changes
            within a chunk, the parts count as rows.
        rope_positions: with M-RoPE, positions that rope rotates all tokens of the chunks by, `[., 3]`; None for their
            positions in their sequences.
    """
    tables = np.asarray(tables, np.int32)
    starts = np.cumsum([0, *(len(ids) for ids, _, _ in chunks)]).astype(np.int32)
    total, batch = tokens or int(starts[-1]), rows or len(chunks)
    columns = _token_columns(chunks, starts, total)
    if seen is not None:
        columns["seen"] = np.zeros((total, 2), np.int32)
        columns["seen"][: len(seen)] = seen
    if rope_positions is not None:
        columns["rope_positions"] = np.zeros((total, 3), np.int32)
        columns["rope_positions"][: len(rope_positions)] = rope_positions
    cut = _cut_tiles(chunks, starts, tile, seen)
    tiles = np.zeros((tile_count(total, batch, tile), 4), np.int32)
    tiles[: len(cut)] = cut
    padded = np.zeros((*tables.shape[:-2], batch, tables.shape[-1]), np.int32)
    padded[..., : len(chunks), :] = tables
    samples = np.arange(len(chunks)) if samples is None else samples
    last = np.zeros(batch, np.int32)
    last[: len(samples)] = starts[1:][samples] - 1
    return PrefillBatch(**columns, tables=padded, tiles=tiles, count=np.int32(len(cut)), last=last, tile=tile)


def _token_columns(chunks: Sequence[tuple[Any, int, int]], starts: np.ndarray, total: int) -> dict[str, np.ndarray]:
    """Return the fields of `PrefillBatch` with an entry per token, padded to `total`; chunk r begins at `starts[r]`."""
    columns = {
        name: np.full(total, fill, np.int32)
        for name, fill in (("tokens", 0), ("positions", -1), ("rows", 0), ("rope_lengths", 1))
    }
    for row, (ids, position, prompt) in enumerate(chunks):
        span = slice(starts[row], starts[row + 1])
        at = np.arange(position, position + len(ids), dtype=np.int32)
        columns["tokens"][span], columns["positions"][span], columns["rows"][span] = ids, at, row
        columns["rope_lengths"][span] = np.where(at < prompt, prompt, at + 1)
    return columns


def _cut_tiles(
    chunks: Sequence[tuple[Any, int, int]], starts: np.ndarray, tile: int, seen: np.ndarray | None
) -> np.ndarray:
    """Cut chunks into tiles of at most `tile` tokens that see the same encoder positions (`PrefillTiles.tiles`)."""
    changes = [] if seen is None else (np.flatnonzero((np.diff(seen, axis=0) != 0).any(axis=1)) + 1).tolist()
    tiles = []
    for row, (ids, position, _) in enumerate(chunks):
        start = int(starts[row])
        parts = [0, *(change - start for change in changes if start < change < starts[row + 1]), len(ids)]
        for begin, end in pairwise(parts):
            for first in range(begin, end, tile):
                tiles.append((row, start + first, position + first, min(tile, end - first)))
    return np.array(tiles, np.int32).reshape(-1, 4)


def tile_count(tokens: int, rows: int, tile: int = TILE) -> int:
    """Return the maximum number of tiles for `tokens` tokens of `rows` sequences."""
    return -(-tokens // tile) + rows
