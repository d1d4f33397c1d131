"""Read the layouts of bitsandbytes: NF4 and FP4 in blocks of consecutive values, and int8 with a scale a row."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.checkpoint.packed.declared import Declared
from jaxinfer.checkpoint.packed.matrix import Grid, PackedMatrix, plain
from jaxinfer.checkpoint.packed.tensors import Tensors
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.checkpoint.size_limits import is_int
from jaxinfer.errors import CheckpointError

INT8_UNIT = np.float32(1 / 127)
"""Value of one step of int8, in units of a row's largest magnitude (`SCB`)."""


@dataclass(frozen=True)
class FourBitMatrix:
    """Matrix in codes of four bits, row after row, two a byte with the high half first; blocks of consecutive values
    share a scale.
    """

    shape: tuple[int, int]
    octets: np.ndarray
    """`[values / 2]` uint8, a view of the file."""
    table: np.ndarray
    """Value of each code, `[16]` float32."""
    scales: np.ndarray
    """Scale of each block, float32."""
    block: int
    dtype: str = "F32"

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """Dequantise a part of the matrix, `[rows, columns]` float32."""
        width = self.shape[1]
        first, end = rows.start * width, rows.stop * width
        octets = self.octets[first // 2 : -(-end // 2)]
        codes = np.stack([octets >> 4, octets & 15], axis=-1).reshape(-1)[first % 2 :][: end - first]
        scales = self.scales[np.arange(first, end) // self.block]
        return (self.table[codes] * scales).reshape(rows.stop - rows.start, width)[:, columns]


def four_bit(source: Tensors, name: str, declared: Declared) -> FourBitMatrix | None:
    """Read NF4 or FP4: `quant_map[code] * absmax[block]`, where `absmax` may be quantised to 8 bits itself."""
    weight = f"{name}.weight"
    kind = next((one for one in ("nf4", "fp4") if source.has(f"{weight}.quant_state.bitsandbytes__{one}")), None)
    if kind is None or not source.has(weight, "U8"):
        return None
    state = _state(source, f"{weight}.quant_state.bitsandbytes__{kind}")
    shape, block = state["shape"], state["blocksize"]
    octets = source.read(weight).reshape(-1)
    values, table = shape[0] * shape[1], source.read(source.need(f"{weight}.quant_map")).astype(np.float32)
    if octets.size != -(-values // 2) or table.shape != (16,):
        raise CheckpointError(
            f"tensor {weight!r} has {octets.size} bytes and {table.size} values of codes; a matrix of shape "
            f"{list(shape)} (quant_state) needs {-(-values // 2)} and 16"
        )
    scales = source.read(source.need(f"{weight}.absmax")).reshape(-1)
    if source.has(f"{weight}.nested_absmax"):
        scales = _nested(source, weight, scales, state)
    if scales.size != -(-values // block):
        raise CheckpointError(
            f"tensor {weight + '.absmax'!r} has {scales.size} values; {values} values in blocks of {block} need "
            f"{-(-values // block)}"
        )
    return FourBitMatrix(tuple(shape), octets, table, scales.astype(np.float32), block)


def int8_rows(source: Tensors, name: str, declared: Declared) -> PackedMatrix | None:
    """Read int8 with the largest magnitude of each row (`SCB`)."""
    weight, largest = f"{name}.weight", f"{name}.SCB"
    if not source.has(weight, "I8") or not source.has(largest):
        return None
    source.has(f"{name}.weight_format")  # names the layout in GPU memory, which does not change the file's
    shape = source.matrix_shape(weight)
    source.expect(largest, shape[:1])
    scales = source.read(largest).astype(np.float32)[:, None] * INT8_UNIT
    return PackedMatrix(shape, plain(source, weight), Grid(lambda rows, columns: scales[rows, columns], 1, shape[1]))


def _nested(source: Tensors, weight: str, codes: np.ndarray, state: dict[str, Any]) -> np.ndarray:
    """Dequantise the scales of blocks, which are codes of 8 bits in blocks of their own."""
    table = source.read(source.need(f"{weight}.nested_quant_map")).astype(np.float32)
    largest = source.read(f"{weight}.nested_absmax").astype(np.float32)
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    fits = is_int(block) and block > 0 and largest.size == -(-codes.size // block)
    if not fits or table.shape != (256,) or codes.dtype != np.uint8 or not isinstance(offset, int | float):
        raise CheckpointError(f"tensors {weight + '.nested_absmax'!r} and others do not fit quant_state {show(state)}")
    return table[codes] * largest[np.arange(codes.size) // block] + np.float32(offset)


def _state(source: Tensors, name: str) -> dict[str, Any]:
    """Read the JSON object that bitsandbytes keeps as a tensor of bytes."""
    try:
        state = json.loads(source.read(name).astype(np.uint8).tobytes())
        shape = state["shape"]
        fits = len(shape) == 2 and all(is_int(one) and one > 0 for one in (*shape, state["blocksize"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"tensor {name!r} is not the JSON object that bitsandbytes writes") from error
    if not fits:
        raise CheckpointError(
            f"tensor {name!r}: shape={show(shape)}, blocksize={show(state['blocksize'])} is no matrix"
        )
    return state
