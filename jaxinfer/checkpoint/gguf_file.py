"""Parse the header of a GGUF file: metadata and tensor infos, checked before any tensor is read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Block sizes and dequantisation come from the package
`gguf`. Its reader is not used: its errors name neither file nor tensor, and it keeps an object per vocabulary entry.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxinfer.checkpoint.plain_json import shorten, show
from jaxinfer.errors import CheckpointError, ConfigError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Alignment of tensors in bytes, unless the metadata states another."""
MAX_AXES = 4

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""`struct` formats by type of a metadata value."""
_STRING, _ARRAY = 8, 9
_FETCH = "Fetch the file again"


def library() -> ModuleType:
    """Import the package `gguf`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"GGUF files are read with the package gguf, which cannot be imported ({error}): "
            'pip install "jaxinfer[gguf]", or pip install gguf'
        ) from error
    return gguf


@dataclass(frozen=True)
class GgufTensor:
    """Location, type and shape of a tensor."""

    kind: str
    """Name of the ggml type, such as "Q4_K"."""
    shape: tuple[int, ...]
    """Shape in row-major order; GGUF states the fastest axis first."""
    offset: int
    """Offset of the first byte from the start of the file."""
    row_bytes: int
    """Number of bytes of one row (all of the last axis)."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.shape[:-1])


class GgufFile:
    """Metadata and tensor infos of a GGUF file; its bytes are mapped.

    Raises:
        CheckpointError: it is not a GGUF file, or is damaged or truncated; names the file and the field or tensor.
        ConfigError: the package `gguf` is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        library()
        try:
            with open(path, "rb") as opened:
                found = opened.read(len(MAGIC))
                if found != MAGIC:
                    raise CheckpointError(f"{path} is not a GGUF file: it begins with {found!r}, not with {MAGIC!r}.")
                self.bytes = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
        header = _Header(path, self.bytes)
        self.metadata: Mapping[str, Any] = header.metadata
        self.tensors: Mapping[str, GgufTensor] = header.tensors

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """Return a metadata value, or `default` if it is absent; integers pass as floats.

        Raises:
            CheckpointError: the value has another type.
        """
        value = self.metadata.get(name, default)
        if kind is float and type(value) is int:
            value = float(value)
        if value is not default and type(value) is not kind:
            raise CheckpointError(f"{self.path}: {name} is {show(value)}; it must be of type {kind.__name__}.")
        return value

    def require(self, name: str, kind: type) -> Any:
        """Return a metadata value.

        Raises:
            CheckpointError: it is absent or has another type.
        """
        if name not in self.metadata:
            raise CheckpointError(f"{self.path} has no metadata {name!r}: the file is incomplete. {_FETCH}.")
        return self.get(name, kind)


class _Header:
    """Parser of the bytes before the tensors."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, len(MAGIC)
        version = self._scalar("I")
        if version not in VERSIONS:
            raise CheckpointError(
                f"{path} has GGUF version {version}; supported: {', '.join(map(str, VERSIONS))}, little-endian."
            )
        tensors, values = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(values):
            name = self._string("a metadata name")
            if name in self.metadata:
                raise CheckpointError(f"{path} states metadata {shorten(name)!r} twice.")
            self.metadata[name] = self._value(name, self._scalar("I"))
        infos = [self._info() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise CheckpointError(f"{path}: general.alignment is {show(alignment)}; it must be from 1 to {1 << 20}.")
        start = -(-self._at // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            if name in self.tensors:
                raise CheckpointError(f"{path} has tensor {shorten(name)!r} twice.")
            self.tensors[name] = self._tensor(name, shape, kind, start + offset)

    def _take(self, size: int, what: str) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise CheckpointError(
                f"{self._path} is truncated: {what} ends at byte {end}, the file at {len(self._data)}. {_FETCH}."
            )
        found = self._data[self._at : end]
        self._at = end
        return found

    def _scalar(self, kind: str, what: str = "its header") -> Any:
        return struct.unpack(f"<{kind}", self._take(struct.calcsize(f"<{kind}"), what))[0]

    def _string(self, what: str) -> str:
        try:
            return self._take(int.from_bytes(self._take(8, what), "little"), what).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self._path}: {what} is not UTF-8 text ({error}). {_FETCH}.") from error

    def _value(self, name: str, kind: int) -> Any:
        what = f"metadata {shorten(name)!r}"
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self._string(what)
        if kind != _ARRAY:
            raise CheckpointError(f"{self._path}: {what} has type {kind}, which GGUF does not define. {_FETCH}.")
        kind, count = self._scalar("I", what), self._scalar("Q", what)
        if kind in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[kind]}")
            return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self._take(count * size, what)))
        if kind != _STRING:
            raise CheckpointError(f"{self._path}: {what} is an array of type {kind}; arrays of arrays are not read.")
        return [self._string(what) for _ in range(count)]

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, shape, type and offset of a tensor."""
        name = self._string("a tensor's name")
        what = f"the info of tensor {shorten(name)!r}"
        axes = self._scalar("I", what)
        if not 1 <= axes <= MAX_AXES:
            raise CheckpointError(f"{self._path}: {what} states {axes} axes; it must be from 1 to {MAX_AXES}.")
        shape = tuple(self._scalar("Q", what) for _ in range(axes))[::-1]
        return name, shape, self._scalar("I", what), self._scalar("Q", what)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        gguf, what = library(), f"{self._path}: tensor {shorten(name)!r}"
        try:
            kind = gguf.GGMLQuantizationType(kind)
            block, size = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise CheckpointError(
                f"{what} has type {kind}, which the installed package gguf does not know. Install a newer one "
                "(pip install -U gguf), or use another file of this model."
            ) from None
        if shape[-1] % block:
            raise CheckpointError(
                f"{what} of shape {list(shape)} has rows of {shape[-1]} values, which the blocks of {block} of type "
                f"{kind.name} do not divide. {_FETCH}."
            )
        found = GgufTensor(kind.name, shape, offset, shape[-1] // block * size)
        end = offset + found.rows * found.row_bytes
        if end > len(self._data):
            raise CheckpointError(
                f"{what} is truncated: it ends at byte {end}, the file at {len(self._data)}. {_FETCH}."
            )
        return found
