"""Matrices in FP8 with a scale a row: those of a checkpoint that are so, others quantised as they are read."""

from typing import Any

import numpy as np

from jaxinfer.checkpoint.packed.matrix import Grid, PackedMatrix
from jaxinfer.checkpoint.source import Info, Source
from jaxinfer.kernels.matmul import fp8_matmul


class FP8Source:
    """Source whose method `packed` gives every matrix in FP8, as `kept.PackedSource` reads them."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._made: dict[str, PackedMatrix] = {}

    def names(self) -> list[str]:
        return self._source.names()

    def info(self, name: str) -> Info:
        return self._source.info(name)

    def release(self) -> None:
        self._source.release()

    def packed(self, name: str) -> PackedMatrix:
        """Return a matrix; one that the checkpoint has in FP8 keeps its codes if a row has one scale."""
        find = getattr(self._source, "packed", None)
        found = find and find(name)
        if found is not None and found.fp8 and found.packing.group == found.shape[1]:
            return found
        if name not in self._made:
            self._made[name] = quantised(self._source, name)
        return self._made[name]


def quantised(source: Source, name: str) -> PackedMatrix:
    """Return a tensor `[rows, columns]` as a matrix in FP8 with a scale a row.

    Scales are those of whole rows, computed at the first read of any part of a row and kept.
    """
    shape = tuple(source.info(name).shape)
    scales = np.full(shape[0], -1, np.float32)  # -1: not read yet

    def scales_of(rows: slice) -> np.ndarray:
        if (scales[rows] == -1).any():
            scales[rows] = fp8_matmul.row_scales(source.read(name, (rows, slice(0, shape[1]))))
        return scales[rows]

    def codes(rows: slice, columns: slice) -> np.ndarray:
        whole = columns == slice(0, shape[1])
        values = source.read(name, (rows, columns))
        if whole:
            scales[rows] = fp8_matmul.row_scales(values)
        own = scales_of(rows)
        with np.errstate(invalid="ignore"):  # rows with NaN or infinity: their scale says so
            return fp8_matmul.to_codes(values, own)

    grid = Grid(lambda rows, columns: scales_of(rows)[:, None], 1, shape[1])
    return PackedMatrix(shape, codes, grid, fp8=True)
