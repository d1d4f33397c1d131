"""A checkpoint read as int8: its matrices quantised row by row while they are copied."""

import numpy as np

from jaxinfer.checkpoint.source import Info, Source
from jaxinfer.kernels.matmul import int8_matmul


class Int8Source:
    """A source whose matrices are int8, with a scale for each row: the whole row's, whatever part of it is read."""

    def __init__(self, source: Source):
        self._source = source
        self._scales: dict[str, np.ndarray] = {}
        """Of each tensor read from: `[rows]` float32, of a stack `[E, rows]`; -1 where no row was read yet."""

    def names(self) -> list[str]:
        return self._source.names()

    def info(self, name: str) -> Info:
        return self._source.info(name)

    def release(self) -> None:
        self._source.release()

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        """For slices of all axes the values, int8; for slices of all but the last the scales of these rows, float32.

        The scales of rows are known from when any part of them was first read.
        """
        shape = self.info(name).shape
        slices = slices or (slice(None),) * len(shape)
        rows, columns = slices[: len(shape) - 1], slices[len(shape) - 1 :]
        scales = self._scales.setdefault(name, np.full(shape[:-1], -1, np.float32))[rows]
        unknown = scales < 0
        if not columns and not unknown.any():
            return scales
        values = self._source.read(name, (*rows, slice(None)))  # a view: what is not used is not read
        if unknown.any():
            values = values.astype(np.float32)
            scales[:] = int8_matmul.row_scales(values)
        if not columns:
            return scales
        with np.errstate(invalid="ignore"):  # rows with NaN or infinity: their scale says so
            return int8_matmul.to_int8(values[..., columns[0]], scales)
