"""Convert stacks of experts that lie in a checkpoint as `[E, in, out]` to those of `models.moe_rules`, `[E, out, in]`.

Llama 4 stores `gate_up_proj` as `[E, M, 2F]`, the gate's columns first, and `down_proj` as `[E, F, M]`.
"""

import re
from typing import Any, NamedTuple

from jaxinfer.checkpoint.source import Info, Source

_EXPERTS = re.compile(r".*\.experts\.(gate_up_proj|down_proj)")


class Stored(NamedTuple):
    """Shape and dtype of a transposed tensor."""

    shape: tuple[int, ...]
    dtype: str


class TransposedExperts:
    """Present stacks of experts transposed, and other tensors as they are; only the requested slices are read."""

    def __init__(self, source: Source):
        self._source = source

    def names(self) -> list[str]:
        return self._source.names()

    def release(self) -> None:
        self._source.release()

    def info(self, name: str) -> Info:
        """Return a tensor's shape and dtype."""
        found = self._source.info(name)
        return Stored(tuple(_transposed(found.shape)), found.dtype) if _stack(name, found.shape) else found

    def packed(self, name: str) -> Any:
        """Return a matrix that can be kept in 4 bits, or None (`DequantisedSource.packed`)."""
        find = getattr(self._source, "packed", None)
        return find and find(name)

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Any:
        """Read a tensor, or the part selected by slices of step 1, one per leading axis.

        The array is of NumPy, or of JAX if the source's are.
        """
        shape = self._source.info(name).shape
        if not _stack(name, shape):
            return self._source.read(name, slices)
        stack, rows, columns = (*(slices or ()), *[slice(None)] * 3)[:3]
        return self._source.read(name, (stack, columns, rows)).swapaxes(1, 2)


def transpose(name: str, values: Any) -> Any:
    """Return an array of `models.moe_rules` in the checkpoint's layout, the inverse of `TransposedExperts`.

    Args:
        name: name of the tensor; those that are no stacks of experts are returned unchanged.
        values: array of NumPy or JAX.
    """
    return values.swapaxes(1, 2) if _stack(name, values.shape) else values


def _stack(name: str, shape: Any) -> bool:
    return len(shape) == 3 and _EXPERTS.fullmatch(name) is not None


def _transposed(shape: Any) -> tuple[int, ...]:
    experts, rows, columns = shape
    return experts, columns, rows
