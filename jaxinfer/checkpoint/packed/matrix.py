"""Matrices of quantised values with scales and zero points per block, dequantised part by part or kept in codes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxinfer.checkpoint.packed.tensors import Tensors
from jaxinfer.kernels.matmul.packed_matmul import EXPONENT, MIDDLE, Packing, pack

Read = Callable[[slice, slice], np.ndarray]
"""Reads rows and columns of a matrix: two slices of step 1 -> `[rows, columns]`."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
"""Magnitudes by the three low bits of a 4-bit floating-point value; the fourth bit is the sign."""
SIGNED_E2M1 = np.concatenate([E2M1, -E2M1])
E2M1_PAIRS = np.stack([SIGNED_E2M1[np.arange(256) & 15], SIGNED_E2M1[np.arange(256) >> 4]], axis=-1)
"""Table `[256, 2]` of the two values encoded by each byte, the low half first."""

MXFP4 = Packing(32, True, EXPONENT)
"""How a matrix of MXFP4 is kept."""


@dataclass(frozen=True)
class Grid:
    """Values that blocks of a matrix share, such as scales.

    Entry `[i, j]` belongs to rows `i * rows` to `(i + 1) * rows` and columns `j * columns` to `(j + 1) * columns`.
    """

    read: Read
    """Reads entries."""
    rows: int = 1
    columns: int = 1
    order: np.ndarray | None = None
    """Column of the grid for each column of the matrix, where these are not in order (`g_idx` of GPTQ)."""

    @property
    def blocks(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.rows, self.columns

    def part(self, rows: slice, columns: slice) -> np.ndarray:
        """Return the values of a part of the matrix, `[rows, columns]`."""
        return self.at(rows, np.arange(columns.start, columns.stop))

    def at(self, rows: slice, columns: np.ndarray) -> np.ndarray:
        """Return the values of some columns of the matrix, `[rows, columns]`."""
        down = np.arange(rows.start, rows.stop) // self.rows
        across = columns // self.columns if self.order is None else self.order[columns]
        if not down.size or not across.size:
            return np.zeros((down.size, across.size), np.float32)
        above, left = int(down[0]), int(across.min())
        values = self.read(slice(above, int(down[-1]) + 1), slice(left, int(across.max()) + 1)).astype(np.float32)
        return values[(down - above)[:, None], (across - left)[None]]


@runtime_checkable
class Kept(Protocol):
    """Matrix, or stack of matrices, that can be kept in 4 bits: `PackedMatrix`, `gpt_oss_weights.PackedExperts`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def packing(self) -> Packing | None: ...
    def octets(self, *part: slice) -> np.ndarray:
        """Return the codes of a part two a byte, `[..., columns / 2]` uint8."""

    def by_group(self, what: str, *part: Any) -> np.ndarray:
        """Return the "scales" or "zeros" of a part, whose columns are given as an array."""


@dataclass(frozen=True)
class PackedMatrix:
    """Matrix whose values are `(codes - zeros) * scales + biases`, computed in float32 for the part that is read."""

    shape: tuple[int, int]
    codes: Read
    """Reads quantised values."""
    scales: Grid
    zeros: Grid | None = None
    biases: Grid | None = None
    dtype: str = "F32"
    """Safetensors name of the dtype of the dequantised values."""
    bits: int | None = None
    """Bits of a code, for codes that are unsigned integers."""
    scale_dtype: str = "F32"
    """Safetensors name of the dtype of the scales; "U8" for exponents of two."""
    fp8: bool = False
    """Whether codes are FP8 (e4m3)."""

    @cached_property
    def packing(self) -> Packing | None:
        """How the matrix can be kept in codes; None if it cannot, such as with groups in another order."""
        dtype = {"F16": "float16", "BF16": "bfloat16", "U8": "bfloat16"}.get(self.scale_dtype, "float32")
        group = min(self.scales.columns, self.shape[1])
        if self.fp8:
            # Rows of a block have its scale each, so that they can lie where fused or padded weights have them.
            return Packing(group, True, dtype, fp8=True) if self.zeros is None else None
        grids = [self.scales, *([] if self.zeros is None else [self.zeros])]
        if self.bits != 4 or self.biases is not None or self.zeros is None:
            return None
        if self.scales.rows != 1 or any(grid.order is not None for grid in grids):
            return None
        zeros = self.zeros.read(*(slice(0, -(-size // own)) for size, own in zip(self.shape, self.zeros.blocks)))
        apart = self.zeros.columns % self.scales.columns and self.zeros.columns < self.shape[1]
        if apart or not 0 <= zeros.min() <= zeros.max() <= 2 * MIDDLE:
            return None
        return Packing(group, bool((zeros == MIDDLE).all()), dtype)

    def octets(self, rows: slice, columns: slice) -> np.ndarray:
        """Return the codes of a part of the matrix two a byte, `[rows, columns / 2]` uint8, or those of FP8."""
        codes = self.codes(rows, columns)
        return codes if self.fp8 else pack(codes)

    def by_group(self, what: str, rows: slice, columns: np.ndarray) -> np.ndarray:
        """Return the "scales" or "zeros" of some columns, `[rows, columns]`."""
        return getattr(self, what).at(rows, columns)

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """Dequantise a part of the matrix, `[rows, columns]` float32."""
        values = self.codes(rows, columns).astype(np.float32)
        if self.zeros is not None:
            values = values - self.zeros.part(rows, columns)
        values = values * self.scales.part(rows, columns)
        return values if self.biases is None else values + self.biases.part(rows, columns)


def plain(source: Tensors, name: str) -> Read:
    """Return the reader of a tensor `[rows, columns]` as float32."""
    return lambda rows, columns: source.read(name, (rows, columns)).astype(np.float32)


def transposed(read: Read) -> Read:
    """Return the reader of a transposed matrix."""
    return lambda rows, columns: read(columns, rows).T


def packed_bits(
    source: Tensors, name: str, bits: int, *, order: tuple[int, ...] = (), words_first: bool = False
) -> Read:
    """Return the reader of unsigned integers of a few bits that are packed into the 32-bit words of a tensor, as uint8.

    Value i of a row has the bits from `i * bits` on of the row's words, the lowest bits first, as GPTQ, AWQ, MLX and
    `pack-quantized` of compressed-tensors store them.

    Args:
        source: source of the tensor.
        name: tensor of words, `[rows, words]`.
        bits: bits per value.
        order: position of each value within its word, where values are stored in another order (AWQ).
        words_first: whether the tensor is `[words, rows]` instead.
    """
    count = source.info(name).shape[0 if words_first else 1]
    group = 32 // bits if 32 % bits == 0 else 32  # values after which a value begins at a word again
    per_group = group * bits // 32

    def read(rows: slice, columns: slice) -> np.ndarray:
        first, end = columns.start // group, -(-columns.stop // group)
        words = slice(first * per_group, min(end * per_group, count))
        found = source.read(name, (words, rows)).T if words_first else source.read(name, (rows, words))
        values = unpack(np.ascontiguousarray(found), bits)
        if order:
            in_words = values.reshape(len(values), values.shape[1] // group, group)
            values = in_words[..., list(order)].reshape(values.shape)
        start = columns.start - first * group
        return values[:, start : start + columns.stop - columns.start]

    return read


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpack integers of `bits` bits from 32-bit words, the lowest bits first; `[rows, words]` -> `[rows, values]`.

    Bits at the end of a row that do not make a whole value are dropped.
    """
    octets = words.view(np.uint8)
    if bits == 8:
        return octets
    if bits == 4:
        return np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), 2 * octets.shape[1])
    each = np.unpackbits(octets, axis=1, bitorder="little")
    count = each.shape[1] // bits
    return np.packbits(each[:, : count * bits].reshape(len(octets), count, bits), axis=-1, bitorder="little").reshape(
        len(octets), count
    )


def packed_e2m1(source: Tensors, name: str) -> Read:
    """Return the reader of 4-bit floating-point values, two a byte: `[rows, columns / 2]` uint8."""

    def read(rows: slice, columns: slice) -> np.ndarray:
        first = columns.start // 2
        octets = source.read(name, (rows, slice(first, -(-columns.stop // 2))))
        values = E2M1_PAIRS[octets].reshape(octets.shape[0], octets.shape[1] * 2)
        start = columns.start - 2 * first
        return values[:, start : start + columns.stop - columns.start]

    return read


def whole(values: np.ndarray) -> Read:
    """Return the reader of a grid `[rows, columns]` that is kept in memory."""
    return lambda rows, columns: values[rows, columns]
