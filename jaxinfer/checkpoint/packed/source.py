"""Present the weights of a quantised checkpoint under their usual names, dequantised when they are read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.checkpoint.packed.declared import Declared, declared
from jaxinfer.checkpoint.packed.layouts import LAYOUTS
from jaxinfer.checkpoint.packed.matrix import PackedMatrix
from jaxinfer.checkpoint.packed.tensors import Tensors
from jaxinfer.checkpoint.source import Info, Matrix, Source
from jaxinfer.errors import CheckpointError

_PACKED = re.compile(r"(.*)\.(weight|weight_packed|qweight)")
"""Names of tensors that hold the values of a quantised module."""
_ACTIVATIONS = re.compile(
    r"(.*)\.(input_scale|activation_scale|input_zero_point|input_global_scale|output_scale|output_zero_point"
    r"|weight_shape)"
)
"""Tensors for the quantisation of activations, which are computed in `dtype` here."""


class DequantisedSource:
    """Source of a quantised checkpoint's tensors, whose matrices are dequantised to float32 part by part.

    Raises:
        CheckpointError: tensors of a module are missing or do not fit each other or what is declared, or no tensor is
            quantised.
    """

    def __init__(self, source: Source, format: Declared) -> None:
        self._source = source
        tensors = Tensors(source)
        self._matrices: dict[str, Matrix] = {}
        hidden: set[str] = set()
        for name in source.names():
            match = _PACKED.fullmatch(name)
            if match is None or f"{match[1]}.weight" in self._matrices:
                continue
            tensors.used.clear()
            made = (layout(tensors, match[1], format) for layout in LAYOUTS[format.method])
            matrix = next((one for one in made if one is not None), None)
            if matrix is not None:
                self._matrices[f"{match[1]}.weight"] = matrix
                hidden |= tensors.used
        if not self._matrices:
            raise CheckpointError(
                f"{format.where} declares quantised weights ({format.method}), but no tensor is of this format. If the "
                "weights are not quantised, pass hf_overrides={'quantization_config': None}"
            )
        self._names = [name for name in source.names() if name not in hidden and not _ACTIVATIONS.fullmatch(name)]
        self._names += list(self._matrices)

    def names(self) -> list[str]:
        """Return the names of the tensors, quantised ones under `weight`."""
        return self._names

    def info(self, name: str) -> Info:
        """Return a tensor's dtype and shape."""
        return self._matrices.get(name) or self._source.info(name)

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read a tensor, or the part selected by slices of step 1, one per leading axis."""
        matrix = self._matrices.get(name)
        if matrix is None:
            return self._source.read(name, slices)
        given = (*(slices or ()), slice(None), slice(None))[:2]
        return matrix.read(*(slice(*one.indices(size)[:2]) for one, size in zip(given, matrix.shape, strict=True)))

    def packed(self, name: str) -> PackedMatrix | None:
        """Return a matrix that can be kept in codes (`PackedMatrix.packing`), or None."""
        matrix = self._matrices.get(name)
        return matrix if isinstance(matrix, PackedMatrix) and matrix.packing is not None else None

    def release(self) -> None:
        """Release the memory of data read so far."""
        self._source.release()


def dequantised(source: Source, config: Mapping[str, Any], directory: Path) -> Source:
    """Return a checkpoint's tensors with quantised ones dequantised; the source itself if none is declared.

    Args:
        source: tensors of the files.
        config: contents of config.json.
        directory: checkpoint folder.

    Raises:
        ConfigError: see `declared`.
        CheckpointError: see `DequantisedSource`.
    """
    format = declared(config, directory)
    if format is None or format.method not in LAYOUTS:
        return source
    return DequantisedSource(source, format)
