"""Copy pieces of checkpoint tensors to the shards of a parameter."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxinfer.checkpoint.source import Info, Source
from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.sharding import rules as sharding_rules

ALIGNMENT = 64
"""Alignment in bytes: JAX on CPU adopts a NumPy buffer that starts at a multiple of this, and copies any other."""

COPY_ELEMENTS = 1 << 21
"""Elements copied from the file at a time: 8 MiB of float32, the dtype in which they are quantised."""


def load_param(path: str, param: nnx.Variable, filled: list[Rule], source: Source, mesh: Mesh) -> jax.Array:
    """Load a parameter as one sharded array; each device's shard is read separately.

    Args:
        path: path of the parameter in the module, for errors.
        param: the parameter, with its shape, dtype and layout metadata.
        filled: rules that name the tensors of the parameter; if empty, the parameter is zero.
        source: tensors of the checkpoint.
        mesh: mesh that the parameter is placed on.
    """
    metadata = param.get_metadata()
    placed = sharding_rules.of(mesh, metadata, param.shape, path)

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        own = [slice(*i.indices(n)) for i, n in zip(index, param.shape, strict=True)]
        made = _aligned([i.stop - i.start for i in own], np.dtype(param.dtype))
        if not filled:
            return made
        if not metadata.get("stacked"):
            _copy_param(made, own, tuple(param.shape), metadata, filled, source)
            return made
        stack, *rest = own
        for one, number in zip(made, range(stack.start, stack.stop), strict=True):
            alone = [rule for rule in filled if rule.index == number]
            parts = (alone, source) if alone else (filled, StackEntry(source, number))
            _copy_param(one, rest, tuple(param.shape[1:]), metadata, *parts)
        return made

    return jax.make_array_from_callback(tuple(param.shape), placed, shard)


class StackEntry:
    """Source that presents one entry of stacked tensors."""

    def __init__(self, source: Source, number: int):
        self._source, self._number = source, number

    def names(self) -> list[str]:
        return self._source.names()

    def info(self, name: str) -> Info:
        return self._source.info(name)

    def release(self) -> None:
        self._source.release()

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read the entry, or the part selected by slices of its own axes."""
        return self._source.read(name, (slice(self._number, self._number + 1), *(slices or ())))[0]


def _copy_param(
    made: np.ndarray,
    own: Sequence[slice],
    shape: tuple[int, ...],
    metadata: Mapping[str, Any],
    filled: list[Rule],
    source: Source,
) -> None:
    """Fill the slices `own` of a parameter of this shape, or of one entry of a stack."""
    if "outputs" not in metadata:
        return _copy_plain(made, own, shape, metadata, filled[0].source, source)
    for part, number in zip(made, range(own[0].start, own[0].stop), strict=True):
        _copy_fused(part, own[2:], metadata["outputs"], number, shape[0], filled, source)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Allocate zeros at an address that JAX on CPU adopts without a copy, so that a weight is never in memory twice."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(target: np.ndarray, source: Source, name: str, part: Sequence[slice]) -> None:
    """Copy a part of a tensor to the start of `target`, a few rows at a time.

    Copies are required, since the file may be replaced while the weights are in use. File pages that were read count as
    memory of this process until they are released.
    """
    rows, *others = part
    step = max(1, COPY_ELEMENTS * target.shape[0] // max(1, target.size))
    for first in range(rows.start, rows.stop, step):
        piece = source.read(name, (slice(first, min(first + step, rows.stop)), *others))
        at = (first - rows.start, *[0] * len(others))
        target[tuple(slice(start, start + n) for start, n in zip(at, piece.shape, strict=True))] = piece
        source.release()


def _copy_plain(
    target: np.ndarray,
    own: Sequence[slice],
    shape: tuple[int, ...],
    metadata: Mapping[str, Any],
    name: str,
    source: Source,
) -> None:
    """Fill the slices `own` of a parameter that comes from one tensor; padding stays zero."""
    bounds = metadata.get("unpadded") or shape
    part = [slice(i.start, min(i.stop, n)) for i, n in zip(own, bounds)]
    if "inputs" not in metadata:
        return _copy(target, source, name, part)
    width = own[1].stop - own[1].start
    for piece in metadata["inputs"].pieces(own[1].start // width, shape[1] // width):
        into = target[:, piece.column : piece.column + piece.stop - piece.start]
        _copy(into, source, name, [part[0], slice(piece.start, piece.stop)])


def _copy_fused(
    target: np.ndarray,
    inside: Sequence[slice],
    outputs: Sequence,
    shard: int,
    tp: int,
    filled: list[Rule],
    source: Source,
) -> None:
    """Fill one shard `[columns, in]` of a fused parameter, or the slices `inside` of its columns: the shard's rows of
    each output, in sequence."""
    found = {}
    sizes = {output.name: output.rows for output in outputs}
    for rule in filled:
        offset = 0
        for part in rule.parts:
            found[part] = (rule.source, offset)
            offset += sizes[part]
    column = 0
    for output in outputs:
        name, offset = found[output.name]
        for piece in output.pieces(shard, tp):
            at, rows = column + piece.column, slice(offset + piece.start, offset + piece.stop)
            _copy(target[at : at + rows.stop - rows.start], source, name, [rows, *inside])
        column += output.columns(tp)
