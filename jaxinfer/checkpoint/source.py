"""Protocols of the loader's input: named tensors, read whole or in slices."""

from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Info(Protocol):
    """Metadata of a tensor, available before its data is read."""

    shape: tuple[int, ...]


@runtime_checkable
class Source(Protocol):
    """Source of named tensors (`SafetensorsReader`, `GgufReader`)."""

    def names(self) -> list[str]: ...
    def info(self, name: str) -> Info: ...
    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray: ...
    def release(self) -> None: ...


class Matrix(Protocol):
    """Matrix that is computed from other tensors when a part of it is read."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> str: ...
    def read(self, rows: slice, columns: slice) -> np.ndarray: ...
