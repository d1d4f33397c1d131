"""Batch of encoder inputs for cross-attention, as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer.kernels.attention.xla_attention import TILE
from jaxinfer.media import EncoderInput
from jaxinfer.media.inputs import Features
from jaxinfer.models.base import CrossSource


class EncodeJob(NamedTuple):
    """An encoder input, and where its results go: cache blocks for cross-attention, else slots of the feature pool."""

    input: EncoderInput
    blocks: np.ndarray
    """For each group of cross-attention layers, the blocks of all encoder positions of its request, `[m, n]` int32;
    `[0, 0]` without."""
    first: int = 0
    """Index of the input's first position among them."""
    slots: tuple[int, ...] = ()
    """Slots of the feature pool for its values."""


@dataclass(frozen=True)
class EncodeShape:
    """Sizes that fix the shape of an encoder step."""

    units: int
    """U: number of values to encode."""
    rows: int
    """Number of positions per value; S = U * rows."""
    groups: int
    """m: number of groups of cross-attention layers; 0 if results go to the feature pool."""
    inputs: int
    """Maximum number of inputs; equal to `units` if each value is encoded by itself."""
    tile: int = TILE
    """Maximum number of queries in an attention tile."""

    @property
    def positions(self) -> int:
        """S: number of positions."""
        return self.units * self.rows

    @property
    def tiles(self) -> int:
        """NT: maximum number of tiles."""
        return -(-self.positions // self.tile) + self.inputs

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the integer arrays."""
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
    """Inputs of an encoder step, their positions concatenated."""

    inputs: Any
    """Values, `[U, *shape]`; undefined for padding."""
    numbers: Any
    """Integers that come with each value, `[U, A]` int32."""
    positions: Any
    """Position of each row in its input, or in its value if values are encoded separately, `[S]` int32."""
    blocks: Any
    """Block for the keys and values of each position, `[m, S]`; out of range for padding."""
    offsets: Any
    """Offset of each position in its block, `[S]`."""
    tiles: Any
    """Attention tiles, `[NT, 4]`; see `PrefillTiles`."""
    spans: Any
    """Visible positions of each tile, `[NT, 2]`; see `PrefillTiles`."""
    count: Any
    """Number of tiles in use, `[]`."""
    tile: int = TILE
    """Static: maximum number of queries in a tile."""


def encode_batch(
    source: CrossSource | Features,
    jobs: Sequence[EncodeJob],
    block_size: int,
    num_blocks: int,
    shape: EncodeShape | None = None,
) -> EncodeBatch:
    """Concatenate encoder inputs into a batch, in NumPy.

    Args:
        source: description of the encoder's inputs: for cross-attention, or of features that are encoded together.
        jobs: the inputs.
        block_size: P.
        num_blocks: N.
        shape: shape to pad to; by default nothing is padded.
    """
    units = sum(job.input.count for job in jobs)
    shape = shape or EncodeShape(units, source.rows, len(jobs[0].blocks), units)
    parts = {name: np.zeros(size, np.int32) for name, size in shape.shapes.items()}
    parts["blocks"][:] = num_blocks
    inputs = np.zeros((shape.units, *source.shape), np.float32 if source.shape else np.int32)
    count = source.joint.numbers if isinstance(source, Features) else source.numbers
    numbers, unit, tile = np.zeros((shape.units, count), np.int32), 0, 0
    for job in jobs:
        some, start = slice(unit, unit + job.input.count), unit * shape.rows
        inputs[some], numbers[some] = job.input.values, job.input.numbers
        total = job.input.count * shape.rows
        size = total if source.joint else shape.rows
        for first in range(start, start + total, size):
            parts["positions"][first : first + size] = np.arange(size)
            for at in range(first, first + size, shape.tile):
                parts["tiles"][tile] = 0, at, at - first, min(shape.tile, first + size - at)
                parts["spans"][tile] = first, first + size
                tile += 1
        if shape.groups:
            kept = slice(start, start + job.input.length)
            places = job.first + np.arange(job.input.length)
            parts["blocks"][:, kept], parts["offsets"][kept] = job.blocks[:, places // block_size], places % block_size
        unit += job.input.count
    parts["count"] = np.int32(tile)
    return EncodeBatch(inputs, numbers, **parts, tile=shape.tile)
