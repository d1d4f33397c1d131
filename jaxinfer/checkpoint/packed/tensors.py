"""Look up the tensors of quantised modules and check their shapes."""

import numpy as np

from jaxinfer.checkpoint.source import Source
from jaxinfer.errors import CheckpointError


class Tensors:
    """Tensors of a source, looked up by the names that a quantised layout expects."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._names = frozenset(source.names())
        self.used: set[str] = set()
        """Tensors that were found since this set was last cleared."""
        self.info, self.read = source.info, source.read

    def dtype_of(self, name: str) -> str:
        """Return the safetensors name of a tensor's dtype."""
        return getattr(self._source.info(name), "dtype", "F32")

    def has(self, name: str, *dtypes: str) -> bool:
        """Return whether the source has a tensor, of one of these dtypes if any are given."""
        found = name in self._names and (not dtypes or self.dtype_of(name) in dtypes)
        if found:
            self.used.add(name)
        return found

    def need(self, name: str) -> str:
        """Return the name of a tensor that a quantised module must have.

        Raises:
            CheckpointError: it is missing.
        """
        if not self.has(name):
            raise CheckpointError(f"tensor {name!r} is missing, which belongs to the quantised weight of its module")
        return name

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """Return the shape of a tensor of two axes.

        Raises:
            CheckpointError: it has another number of axes.
        """
        shape = tuple(self._source.info(name).shape)
        if len(shape) != 2:
            raise CheckpointError(f"quantised tensor {name!r} has shape {list(shape)}; only matrices are read")
        return shape

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Check a tensor's shape.

        Raises:
            CheckpointError: it has another shape.
        """
        found = tuple(self._source.info(name).shape)
        if found != shape:
            raise CheckpointError(f"quantised tensor {name!r}: expected shape {list(shape)}, found {list(found)}")

    def scalar(self, name: str) -> np.float32:
        """Read a tensor of one value.

        Raises:
            CheckpointError: it has another number of values.
        """
        values = self._source.read(name)
        if values.size != 1:
            raise CheckpointError(f"quantised tensor {name!r} has {values.size} values; expected one")
        return np.float32(values.reshape(-1)[0])
