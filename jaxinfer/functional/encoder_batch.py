"""The step of an encoder whose positions a decoder attends to: several inputs side by side, as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer.kernels.attention.xla_attention import TILE
from jaxinfer.media import EncoderInput
from jaxinfer.models.base import CrossSource


class EncodeJob(NamedTuple):
    """An input to be encoded, and where the keys and values of its positions go."""

    input: EncoderInput
    blocks: np.ndarray
    """`[m, n]` int32: in each group of cross layers those of all positions that its request reads."""
    first: int
    """Which of these is the input's first."""


@dataclass(frozen=True)
class EncodeShape:
    """What fixes the shape of an encoder step."""

    units: int
    """U: values that are encoded."""
    rows: int
    """Positions that each becomes; S = U * rows."""
    groups: int
    """m: groups of cross layers."""
    inputs: int
    """Inputs at most; as many as units where each is encoded by itself."""
    tile: int = TILE
    """Queries of one tile of attention at most."""

    @property
    def positions(self) -> int:
        """S."""
        return self.units * self.rows

    @property
    def tiles(self) -> int:
        """NT: the most tiles there can be."""
        return -(-self.positions // self.tile) + self.inputs

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays of integers."""
        return {
            "positions": (self.positions,),
            "blocks": (self.groups, self.positions),
            "offsets": (self.positions,),
            "tiles": (self.tiles, 4),
            "spans": (self.tiles, 2),
            "count": (),
        }


@partial(
    jax.tree_util.register_dataclass,
    meta_fields=["tile"],
    data_fields=["inputs", "numbers", "positions", "blocks", "offsets", "tiles", "spans", "count"],
)
@dataclass(frozen=True)
class EncodeBatch:
    """Inputs of an encoder, their positions one after another."""

    inputs: Any
    """`[U, *shape]` values; of padding anything."""
    numbers: Any
    """`[U, A]` int32 that come with them."""
    positions: Any
    """`[S]` int32: each one's position in its input, or where units are encoded apart in its unit."""
    blocks: Any
    """`[m, S]` the block that its keys and values go to; one that there is not for padding."""
    offsets: Any
    """`[S]` its place in the block."""
    tiles: Any
    """`[NT, 4]` and
    """
    spans: Any
    """`[NT, 2]` which of them see which, see `PrefillTiles`."""
    count: Any
    """`[]` tiles in use."""
    tile: int = TILE
    """Static: queries a tile holds at most."""


def encode_batch(
    source: CrossSource, jobs: Sequence[EncodeJob], block_size: int, num_blocks: int, shape: EncodeShape | None = None
) -> EncodeBatch:
    """Lays inputs side by side, in NumPy.

    Args:
        source: what the encoder reads.
        jobs: the inputs.
        block_size: P.
        num_blocks: N.
        shape: what to pad to; by default nothing is padded.
    """
    units = sum(job.input.count for job in jobs)
    shape = shape or EncodeShape(units, source.rows, len(jobs[0].blocks), units)
    parts = {name: np.zeros(size, np.int32) for name, size in shape.shapes.items()}
    parts["blocks"][:] = num_blocks
    inputs = np.zeros((shape.units, *source.shape), np.float32 if source.shape else np.int32)
    numbers, unit, tile = np.zeros((shape.units, source.numbers), np.int32), 0, 0
    for job in jobs:
        some, start = slice(unit, unit + job.input.count), unit * source.rows
        inputs[some], numbers[some] = job.input.values, job.input.numbers
        total = job.input.count * source.rows
        size = total if source.joint else source.rows
        for first in range(start, start + total, size):
            parts["positions"][first : first + size] = np.arange(size)
            for at in range(first, first + size, shape.tile):
                parts["tiles"][tile] = 0, at, at - first, min(shape.tile, first + size - at)
                parts["spans"][tile] = first, first + size
                tile += 1
        kept = slice(start, start + job.input.length)
        places = job.first + np.arange(job.input.length)
        parts["blocks"][:, kept], parts["offsets"][kept] = job.blocks[:, places // block_size], places % block_size
        unit += job.input.count
    parts["count"] = np.int32(tile)
    return EncodeBatch(inputs, numbers, **parts, tile=shape.tile)
