"""What the loader reads from: tensors by their names, whole or in parts."""

from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Info(Protocol):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]


@runtime_checkable
class Source(Protocol):
    """Where tensors are read from (`checkpoint.safetensors.SafetensorsReader`)."""

    def names(self) -> list[str]: ...
    def info(self, name: str) -> Info: ...
    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray: ...
    def release(self) -> None: ...
