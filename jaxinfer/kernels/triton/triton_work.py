"""Work items of the attention kernel (`triton_kernels.attend`), computed on the device from lengths or tiles."""

import jax
import jax.numpy as jnp

from jaxinfer.kernels.attention.paged import DecodeRows, PrefillTiles, Scoring

WAVES = 2
"""Decode: most waves of concurrent programs, beside the first program of each row."""
LONG_PIECE = 1024
"""Decode: with pieces of at least this many keys the work is cut into `WAVES` waves, so that the last one is a smaller
part of the whole; shorter pieces into one wave, as each piece waits for its first loads."""


def decode_items(rows: int, longest: int, running: int, block_n: int) -> int:
    """Return the maximum number of pieces that `decode_work` makes.

    It is one per row and `WAVES` per program that runs at a time, and at most the number of tiles.

    Args:
        rows: rows of a step.
        longest: maximum number of keys of a row.
        running: programs that the device runs at a time.
        block_n: keys of a tile.
    """
    return min(rows + WAVES * running, rows * -(-longest // block_n))


def decode_work(
    step: DecodeRows, scoring: Scoring, *, items: int, running: int, block_n: int
) -> tuple[jax.Array, jax.Array]:
    """Cut the live keys of all rows into pieces of nearly equal size (split-K), on the device.

    The piece size depends on the sum of lengths, so ragged rows, equal rows and a single long row all occupy the whole
    device. Independent of the layer within a kind, so it is computed once per step.

    Args:
        step: block tables and lengths.
        scoring: its window limits the keys.
        items: room for pieces, I, from `decode_items`.
        running: pieces that run concurrently.
        block_n: piece sizes are multiples of it.

    Returns:
        Work items `[I, 8]` (`triton_kernels.attend`), and each row's first piece and number of pieces `[B, 2]`.
    """
    ends, batch = step.lengths, step.lengths.shape[0]
    firsts = jnp.where(ends > 0, step.first_keys(scoring), 0)
    live = ends - firsts
    fair = _ceil(live.sum(), running)
    piece = jnp.maximum(jnp.minimum(fair, LONG_PIECE), _ceil(fair, WAVES))
    piece = jnp.maximum(_ceil(piece, block_n), 1) * block_n
    # Pieces of a row have equal size, instead of full pieces and a remainder.
    piece = jnp.maximum(_ceil(_ceil(live, jnp.maximum(_ceil(live, piece), 1)), block_n), 1) * block_n
    counts = _ceil(live, piece)
    order = jnp.arange(batch)
    # A masked sum: cumsum would compile to several kernels.
    stops = jnp.where(order <= order[:, None], counts, 0).sum(axis=1)
    starts = stops - counts
    at = jnp.arange(items)
    owner = (stops <= at[:, None]).sum(axis=1)
    row = jnp.minimum(owner, batch - 1)
    used = owner < batch
    end, size, position = ends[row], piece[row], ends[row] - 1
    first = firsts[row] + (at - starts[row]) * size
    fresh = position if step.starts is None else end
    columns = [row + step.first, row, position, used, first, jnp.minimum(first + size, end), fresh, counts[row] > 1]
    return _columns(columns), _columns([starts, counts])


def prefill_work(step: PrefillTiles, scoring: Scoring, *, tokens: int, tile: int, align: int = 1) -> jax.Array:
    """Convert tiles to work items `[NT, 8]`, in reverse order: the last tiles of a sequence see the most keys.

    Unused items get the step's padding tokens and no keys, which makes their output 0. Of causal items the first key is
    a multiple of `align`; those before a window are masked.
    """
    row, token, position, count = step.tiles.T
    at = jnp.arange(len(row))
    live = at < step.count
    position = jnp.where(live, position, 0)
    # First position of the chunk: keys from there on belong to this step.
    same = (row == row[:, None]) & live
    fresh = jnp.where(same, position, jnp.iinfo(jnp.int32).max).min(axis=1)
    used = jnp.where(live, count, 0).sum()
    padding = used + (at - step.count) * tile
    first, end = scoring.first_key(position) // align * align, position + count
    if step.spans is not None:  # a causal query at the last key's position sees all keys in the span
        (first, end), fresh = step.spans.T, step.spans[:, 1]
        position = end - 1
    columns = [
        row,
        jnp.where(live, token, padding),
        position,
        jnp.where(live, count, jnp.clip(tokens - padding, 0, tile)),
        jnp.where(live, first, 0),
        jnp.where(live, end, 0),
        fresh,
        live,
    ]
    return _columns(columns)[::-1]


def _ceil(a: jax.Array, b: jax.Array | int) -> jax.Array:
    return (a + b - 1) // b


def _columns(columns: list[jax.Array]) -> jax.Array:
    return jnp.stack([column.astype(jnp.int32) for column in columns], axis=1)
