"""Checkpoint source in memory."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxinfer.checkpoint.safetensors_header import DTYPES


class Held(NamedTuple):
    """Metadata of a tensor."""

    shape: tuple[int, ...]
    dtype: str


class MemorySource:
    """`checkpoint.source.Source` over a mapping of names to arrays."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.tensors = dict(tensors)

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> Held:
        tensor = self.tensors[name]
        return Held(tensor.shape, next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype))

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        for one, size in zip(slices or (), self.tensors[name].shape, strict=False):
            assert one.step in (None, 1) and 0 <= one.indices(size)[1] <= size, "as the real reader asks for"
        return self.tensors[name][slices or ()]

    def release(self) -> None:
        pass
