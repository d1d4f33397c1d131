"""Read and check the header of one safetensors file, before any of its tensors is read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfer.checkpoint.plain_json import refuse_duplicates, show
from jaxinfer.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""Size limit of a header in bytes, as in the safetensors library."""

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
"""NumPy dtypes by safetensors name."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Location, dtype and shape of a tensor."""

    file: Path
    dtype: str
    """Safetensors dtype name, a key of `DTYPES`."""
    shape: tuple[int, ...]
    offset: int
    """Offset of the first byte from the start of the file."""
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read and check one file's header; return its tensors in the order of their bytes."""
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as opened:
            length_bytes = opened.read(8)
            length = int.from_bytes(length_bytes, "little")
            _check_header_length(file, size, length_bytes, length)
            text = opened.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}.") from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a bad header: {error}. Fetch it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file} has a bad header: expected an object, found {type(header).__name__}. Fetch it again."
        )
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_contiguous(file, size, 8 + length, tensors)
    return tensors


def _check_header_length(file: Path, size: int, length_bytes: bytes, length: int) -> None:
    if length_bytes == b"version ":
        raise CheckpointError(f"{file} is a Git LFS pointer, not tensors; run `git lfs pull` in its folder.")
    if size < 8:
        raise CheckpointError(f"{file} is truncated: a header needs 8 bytes, found {size}. Fetch it again.")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file} has a bad header: it claims {length} bytes, and at most {MAX_HEADER_BYTES} are accepted. Fetch it "
            "again."
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{file} is truncated: its header needs {8 + length} bytes, found {size}. Fetch it again."
        )


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Check a single header entry."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name!r} has dtype {show(dtype)}; supported: {', '.join(DTYPES)}.")
    if not _are_sizes(shape):
        raise CheckpointError(f"{file}: tensor {name!r} has shape {show(shape)}; expected a list of sizes.")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{file}: tensor {name!r} has data_offsets {show(offsets)}; expected [begin, end].")
    expected, found = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if expected != found:
        raise CheckpointError(
            f"{file}: tensor {name!r} of dtype {dtype} and shape {show(shape)} needs "
            f"{expected} bytes, found data_offsets {offsets}, which is {found}."
        )
    return TensorInfo(file, dtype, tuple(shape), data_start + offsets[0], expected)


def _are_sizes(values: Any) -> bool:
    """Return whether a value is a valid NumPy shape."""
    return (
        isinstance(values, list)
        and len(values) <= 32
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _check_contiguous(file: Path, size: int, data_start: int, tensors: dict[str, TensorInfo]) -> None:
    """Check that every byte after the header belongs to exactly one tensor."""
    end = data_start
    for name, info in tensors.items():
        if info.offset != end:
            fault = "overlaps the one before it" if info.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{file}: tensor {name!r} {fault}: expected at byte {end}, found at {info.offset}.")
        end += info.nbytes
        if end > size:
            raise CheckpointError(
                f"{file} is truncated: tensor {name!r} ends at byte {end}, the file at {size}. Fetch it again."
            )
    if end != size:
        raise CheckpointError(f"{file}: the tensors end at byte {end}, but the file has {size} bytes. Fetch it again.")
