"""Device side of a joint step (`joint`)."""

import jax
import jax.numpy as jnp

from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.device_state import RowState


def take_decodes(
    bucket: Bucket, parts: dict[str, jax.Array], rows: RowState, owners: jax.Array, block_size: int
) -> tuple[RowState, jax.Array]:
    """Take the decodes of a joint step out of its unpacked parts, and put their tokens and lengths there.

    Args:
        bucket: the step.
        parts: its parts, which are changed.
        rows: last tokens and block tables.
        owners: row of each chunk.
        block_size: positions of a block.

    Returns:
        `rows` with the blocks that decodes write, and the row of each chunk, then of each place for a decode.
    """
    decoding, places = parts.pop("decoding"), bucket.decodes
    positions, live = parts["positions"][-places:], decoding < len(rows.tokens)
    tables, own = rows.tables, jnp.minimum(decoding, len(rows.tokens) - 1)
    if not bucket.contiguous:
        group, number = jnp.arange(bucket.groups)[:, None], jnp.maximum(positions, 0) // block_size
        tables = tables.at[group, decoding, number].set(parts.pop("blocks"), mode="drop")
    last = jnp.where(live, rows.tokens[own], parts["tokens"][-places:])
    parts["tokens"] = parts["tokens"].at[-places:].set(last)
    parts["lengths"] = jnp.where(live, positions + 1, 0)
    return RowState(rows.tokens, tables), jnp.concatenate([owners, own])
