"""Quantise matrices of a checkpoint to int8, row by row, while they are loaded."""

from collections.abc import Mapping

import numpy as np

from jaxinfer.checkpoint.source import Info, Source
from jaxinfer.kernels.matmul import int8_matmul


class Int8Source:
    """Source that quantises matrices to int8 with one scale per row, computed over the whole row even for partial
    reads.

    Rows are rotated first (`int8_matmul.rotation`); `blocks` gives the columns per block by tensor name.
    """

    def __init__(self, source: Source, blocks: Mapping[str, int]):
        self._source, self._blocks = source, blocks
        self._scales: dict[str, np.ndarray] = {}
        """Row scales by tensor name, float32: `[rows]`, or `[E, rows]` for a stack; -1 for rows not read yet."""

    def names(self) -> list[str]:
        return self._source.names()

    def info(self, name: str) -> Info:
        return self._source.info(name)

    def release(self) -> None:
        self._source.release()

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read int8 values (slices for all axes), or float32 row scales (slices for all axes but the last).

        Scales are computed at the first read of any part of a row and cached.
        """
        shape = self.info(name).shape
        slices = slices or (slice(None),) * len(shape)
        rows, columns = slices[: len(shape) - 1], slices[len(shape) - 1 :]
        scales = self._scales.setdefault(name, np.full(shape[:-1], -1, np.float32))[rows]
        unknown = scales < 0
        if not columns and not unknown.any():
            return scales
        block, wanted = self._blocks[name], slice(*(columns or (slice(None),))[0].indices(shape[-1]))
        first, end = 0, shape[-1]
        if not unknown.any():  # scales need whole rows; once they are known, the requested blocks are enough
            first, end = wanted.start // block * block, -(-wanted.stop // block) * block
        values = self._source.read(name, (*rows, slice(first, end)))
        values = int8_matmul.rotate_weight(values, block)
        if unknown.any():
            scales[:] = int8_matmul.row_scales(values)
        if not columns:
            return scales
        with np.errstate(invalid="ignore"):  # rows with NaN or infinity: their scale says so
            return int8_matmul.to_int8(values[..., wanted.start - first : wanted.stop - first], scales)
