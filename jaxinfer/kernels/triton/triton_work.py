"""The work items of the attention kernel (`triton_kernels.attend`), made on the device from lengths or tiles."""

import jax
import jax.numpy as jnp

from jaxinfer.kernels.attention.paged import DecodeRows, PrefillTiles, Scoring

WAVES = 2
"""Decode: how often all slots are filled at most, beside the first program of each row."""
LONG_PIECE = 1024
"""Decode: pieces of so many keys or more are cut for `WAVES` fillings of the slots, as the last one is then a smaller
part of the whole; shorter ones for one, as each piece pays for its first loads."""


def decode_items(rows: int, longest: int, running: int, block_n: int) -> int:
    """The most pieces that `decode_work` cuts: one a row and `WAVES` a slot, and no more than there are tiles."""
    return min(rows + WAVES * running, rows * -(-longest // block_n))


def decode_work(
    step: DecodeRows, scoring: Scoring, *, items: int, running: int, block_n: int
) -> tuple[jax.Array, jax.Array]:
    """Cuts the live keys of all rows into pieces of nearly equal size (split-K), on the device.

    The size follows from the sum of lengths, so ragged rows, equal ones and a single long one all fill the slots; it is
    the same for all layers of a kind, and computed once a step.

    Args:
        step: tables and lengths.
        scoring: its window hides keys.
        items: room for pieces, I, from `decode_items`.
        running: pieces that run at a time.
        block_n: pieces are multiples of it.

    Returns:
        Work items `[I, 8]` (`triton_kernels.attend`), and for each row its first piece and their count `[B, 2]`.
    """
    ends, batch = step.lengths, step.lengths.shape[0]
    firsts = jnp.where(ends > 0, step.first_keys(scoring), 0)
    live = ends - firsts
    fair = _ceil(live.sum(), running)
    piece = jnp.maximum(jnp.minimum(fair, LONG_PIECE), _ceil(fair, WAVES))
    piece = jnp.maximum(_ceil(piece, block_n), 1) * block_n
    # Each row's pieces are alike: not some full ones and a rest.
    piece = jnp.maximum(_ceil(_ceil(live, jnp.maximum(_ceil(live, piece), 1)), block_n), 1) * block_n
    counts = _ceil(live, piece)
    order = jnp.arange(batch)
    # A sum over a mask, where cumsum would take several kernels.
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


def prefill_work(step: PrefillTiles, scoring: Scoring, *, tokens: int, tile: int) -> jax.Array:
    """The tiles as work items `[NT, 8]`, the last ones first: of one sequence they see the most keys.

    Those that are not needed get the step's padding and no keys, which gives 0 there.
    """
    row, token, position, count = step.tiles.T
    at = jnp.arange(len(row))
    live = at < step.count
    position = jnp.where(live, position, 0)
    # The chunk's first position: keys from there on are the step's own.
    same = (row == row[:, None]) & live
    fresh = jnp.where(same, position, jnp.iinfo(jnp.int32).max).min(axis=1)
    used = jnp.where(live, count, 0).sum()
    padding = used + (at - step.count) * tile
    first, end = scoring.first_key(position), position + count
    if step.spans is not None:  # from its last key on a query sees all before it
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
