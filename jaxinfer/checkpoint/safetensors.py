"""Read safetensors folders: check every header before the first tensor, then read only the requested bytes.

Format: https://huggingface.co/docs/safetensors. The safetensors library is not used: it accepts a tensor named twice in
a header, its errors do not name file and tensor, and reading with it takes twice the memory (docs/decisions.md, 80).
"""

from __future__ import annotations

import logging
import math
import mmap
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxinfer.checkpoint.formats import explain_missing
from jaxinfer.checkpoint.plain_json import read_json, shorten, show
from jaxinfer.checkpoint.safetensors_header import DTYPES, TensorInfo, read_header
from jaxinfer.errors import CheckpointError

log = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsReader:
    """Reader of the tensors in `single`, or in the shards listed by model.safetensors.index.json.

    Every header is read and checked on construction. Can be used as a context manager; returned arrays stay valid after
    `close`.

    Raises:
        CheckpointError: a header is invalid; names the file and the tensor.
    """

    def __init__(self, directory: Path, single: str = SINGLE) -> None:
        self.directory = Path(directory)
        self._maps: dict[Path, mmap.mmap] = {}
        self._closed = False
        if (self.directory / single).is_file():
            self._tensors = read_header(self.directory / single)
        elif (self.directory / INDEX).is_file():
            self._tensors = _read_shards(self.directory)
        else:
            raise CheckpointError(explain_missing(self.directory, f"{SINGLE} or {INDEX}"))

    def names(self) -> list[str]:
        """Return the tensor names in the order of their bytes on disk."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return a tensor's location, dtype and shape.

        Raises:
            CheckpointError: there is no tensor of this name.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.directory} has no tensor {name!r}.")
        return self._tensors[name]

    @property
    def total_bytes(self) -> int:
        """Total size of all tensors in bytes."""
        return sum(info.nbytes for info in self._tensors.values())

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read a tensor, or the part selected by slices of step 1, one per leading axis.

        Returns:
            A read-only view of the mapped file: bytes are read on access only. Copy it before the file may change.
                `jax.device_put` on CPU may keep such a view; `jnp.array` copies.
        """
        info = self.info(name)
        if self._closed:
            raise CheckpointError(
                f"tensor {name!r} of {self.directory} was requested after its reader was closed; read it before."
            )
        whole = np.frombuffer(
            self._map(info.file) if info.nbytes else b"",
            DTYPES[info.dtype],
            math.prod(info.shape),
            info.offset if info.nbytes else 0,
        ).reshape(info.shape)
        if slices is None:
            return whole
        _check_slices(name, info.shape, slices)
        return whole[(*slices, ...)]

    def release(self) -> None:
        """Release the memory of file pages read so far; arrays stay valid and read their bytes again on access.

        Pages of a mapped file count as memory of the process until then, so a loader calls this after each group of
        tensors that it has copied.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Close the reader. A file stays mapped while an array of it is alive."""
        self.release()
        self._maps.clear()
        self._closed = True

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with open(file, "rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


def _read_shards(directory: Path) -> dict[str, TensorInfo]:
    """Read the index and the headers of all shards, and check them against each other."""
    index = directory / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files; fetch it again.")
    first_of: dict[str, str] = {}
    for name, file in weight_map.items():
        _check_file_name(index, name, file)
        first_of.setdefault(file, name)
    tensors: dict[str, TensorInfo] = {}
    read: dict[Path, Path] = {}  # by resolved path: in the Hub's cache two links may lead to one file
    for file, name in first_of.items():
        path = directory / file
        if not is_file(path):
            raise CheckpointError(
                f"{index} says that tensor {shorten(repr(name))} is in {shorten(repr(file))}, which is absent. Fetch "
                "the missing file."
            )
        if read.setdefault(path.resolve(), path) != path:
            continue
        for found, info in read_header(path).items():
            if found in tensors:
                both = f"{tensors[found].file} and {info.file}"
                raise CheckpointError(f"tensor {shorten(repr(found))} is in two files: {both}; fetch the folder again.")
            tensors[found] = info
    for name, file in weight_map.items():
        if name in tensors and tensors[name].file != read[(directory / file).resolve()]:
            raise CheckpointError(
                f"{index} says that tensor {shorten(repr(name))} is in {shorten(repr(file))}, which lacks it: it is in "
                f"{tensors[name].file}; fetch both again."
            )
    stale = [f"{name} ({file})" for name, file in weight_map.items() if name not in tensors]
    if stale:
        log.warning(
            "%s names %d tensor(s) that their files lack, such as a head that is tied by now: %s. Fetch both again if "
            "the model is then refused as incomplete.",
            index,
            len(stale),
            shorten(", ".join(stale)),
        )
    return tensors


def is_file(path: Path) -> bool:
    """Return whether a file exists; also accepts names that no file system allows."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _check_file_name(index: Path, name: str, file: Any) -> None:
    """Refuse file names that lead out of the folder, or to a file that is not safetensors."""
    plain = isinstance(file, str) and file.endswith(".safetensors") and "\\" not in file and "\0" not in file
    if not plain or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or ":" in file:
        raise CheckpointError(
            f"{index} says that tensor {shorten(repr(name))} is in {show(file)}; only the name of a "
            ".safetensors file inside the folder is accepted."
        )


def _check_slices(name: str, shape: tuple[int, ...], slices: tuple[slice, ...]) -> None:
    """Refuse slices that NumPy would silently clip, because a shard of the wrong size is a wrong weight.

    A start beyond the stop selects an empty part, as for a shard that is all padding.
    """

    def fits(part: slice, size: int) -> bool:
        stop = size if part.stop is None else part.stop
        return part.step in (None, 1) and (part.start or 0) >= 0 and 0 <= stop <= size

    if len(slices) > len(shape) or not all(map(fits, slices, shape)):
        raise CheckpointError(f"tensor {name!r} of shape {shape} has no part {slices}.")
