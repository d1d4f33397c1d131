"""Read and write `jaxinfer.json`, the manifest of a converted folder: written last, checked against the files on load.

It lists each parameter with its shape, dtype and layout, so that a folder converted for one number of devices can be
loaded on another, and each weight file with its size and digest, so that errors name missing or changed files.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxinfer._utils.checks import DEQUANTIZE, FP8, KEPT_QUANTIZATIONS
from jaxinfer.checkpoint.plain_json import read_json
from jaxinfer.checkpoint.safetensors_header import DTYPES
from jaxinfer.checkpoint.source import Source
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding import rules as sharding_rules
from jaxinfer.sharding.policy import Placement

NAME, WEIGHTS = "jaxinfer.json", "weights"
"""Names of the manifest and of the Orbax folder beside it."""
VERSION = 2
"""Version of the manifest format; a greater number was written by a newer jaxinfer. 2 added `Stored.block`."""
SMALL_BYTES = 1 << 20
"""Files up to this size in bytes (Orbax's metadata and small arrays) are checked against their digest on every load."""
SAMPLE_BYTES = 4096
"""Bytes of each source tensor that enter the fingerprint."""
REMEDY = "copy the folder again, or make it again with scripts/convert.py"


@dataclass(frozen=True)
class Stored:
    """Shape, dtype and layout of a stored parameter."""

    shape: tuple[int, ...]
    dtype: str
    spec: tuple[str | None, ...]
    """Mesh axis of each array axis."""
    unpadded: tuple[int, ...] | None = None
    """Shape of the checkpoint tensor, if the parameter is padded."""
    rows: Mapping[str, Sequence[Sequence[int]]] | None = None
    """Row layout of a fused parameter `[tp, columns, ...]`: for each output, the intervals of its rows as (shard,
    first column, start, stop)."""
    columns: Sequence[Sequence[int]] | None = None
    """Column layout of a parameter with zero padding in its last axis: intervals of the tensor's columns as (first
    column, start, stop)."""
    scales_of: str | None = None
    """Path of the int8 parameter that these row scales belong to."""
    stacked: bool = False
    """Whether the first axis stacks several parameters; `unpadded`, `rows` and `columns` then describe one of them."""
    block: int = 1
    """Columns per rotated block of an int8 parameter (`int8_matmul.rotation`); 1 if it is not rotated."""

    @classmethod
    def of(cls, path: str, param: nnx.Param, mesh: Mesh) -> "Stored":
        """Describe a parameter (array or abstract shape) as placed on a mesh."""
        metadata = param.get_metadata()
        scaled = metadata.get("scales_of")
        return cls(
            tuple(param.shape),
            jnp.dtype(param.dtype).name,
            tuple(sharding_rules.of(mesh, metadata, param.shape, path).spec),
            _unpadded(param),
            _rows(param),
            _columns(param, mesh),
            None if scaled is None else ".".join([*path.split(".")[:-1], scaled]),
            bool(metadata.get("stacked")),
            metadata.get("block", 1),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Stored":
        """Restore an entry from the output of `asdict`."""
        lists = {name: None if value[name] is None else tuple(value[name]) for name in ("shape", "spec", "unpadded")}
        return cls(**{**value, **lists})

    def same_as(self, other: "Stored") -> bool:
        """Return whether both have the same shape, dtype and layout, on whatever mesh axes."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("shape", "dtype", "unpadded", "rows", "columns", "block")
        )


def _unpadded(param: nnx.Param) -> tuple[int, ...] | None:
    shape = param.get_metadata().get("unpadded")
    return None if shape is None or tuple(shape) == tuple(param.shape) else tuple(shape)


def _rows(param: nnx.Param) -> dict[str, list[list[int]]] | None:
    outputs = param.get_metadata().get("outputs")
    if outputs is None:
        return None
    found, tp, first = {}, param.shape[1 if param.get_metadata().get("stacked") else 0], 0
    for output in outputs:
        found[output.name] = [
            [shard, first + piece.column, piece.start, piece.stop]
            for shard in range(tp)
            for piece in output.pieces(shard, tp)
        ]
        first += output.columns(tp)
    return found


def _columns(param: nnx.Param, mesh: Mesh) -> list[list[int]] | None:
    """Return the column layout with adjacent intervals merged; None for a layout without padding."""
    metadata = param.get_metadata()
    if "inputs" not in metadata or len(param.shape) < 2:
        return None
    tp = 1 if metadata.get("replicated") else meshes.size(mesh)
    width, found = param.shape[-1] // tp, []
    for shard in range(tp):
        for piece in metadata["inputs"].pieces(shard, tp):
            column = shard * width + piece.column
            last = found[-1] if found else None
            if last and last[2] == piece.start and last[0] + last[2] - last[1] == column:
                last[2] = piece.stop
            else:
                found.append([column, piece.start, piece.stop])
    return None if found == [[0, 0, param.shape[-1]]] else found


@dataclass(frozen=True)
class Manifest:
    """Manifest of a converted folder: conversion settings, parameters by path, and files by relative path."""

    tensor_parallel_size: int
    placement: Mapping[str, str]
    pad_heads: bool
    quantization: str | None
    dtype: str
    source_dtypes: Sequence[str]
    """Dtypes of the source tensors."""
    source_fingerprint: str
    """SHA-256 of the names, dtypes, shapes and first bytes of all source tensors."""
    parameters: Mapping[str, Stored]
    files: Mapping[str, Sequence[Any]]
    """Relative path -> (size in bytes, SHA-256 digest)."""

    @property
    def exact(self) -> bool:
        """Whether `dtype` represents every value of the source exactly."""
        kept, kinds = jnp.finfo(self.dtype), map(jnp.dtype, self.source_dtypes)
        found = (jnp.finfo(kind) for kind in kinds if jnp.issubdtype(kind, jnp.floating))
        return all(one.nmant <= kept.nmant and one.nexp <= kept.nexp for one in found)

    def resolve_options(
        self,
        directory: Path,
        dtype: jnp.dtype,
        *,
        requested: bool,
        quantization: str | None,
        placement: Placement,
        pad_heads: bool,
    ) -> dict[str, Any]:
        """Return the quantisation, placement and padding to run with: the requested values, or the folder's own.

        Args:
            directory: converted folder, for error messages.
            dtype: dtype to run in.
            requested: whether `dtype` was requested explicitly.
            quantization: requested quantisation; None for the folder's own.
            placement: requested placement; without patterns, the folder's own.
            pad_heads: whether padding of heads was requested.

        Raises:
            ConfigError: the folder's weights were rounded, so the requested dtype or quantisation is not available.
        """
        if quantization == FP8 or quantization in KEPT_QUANTIZATIONS:
            raise ConfigError(
                f"quantization is {quantization!r}, but {directory} is a converted folder, whose weights are in "
                f"{self.quantization or self.dtype}; leave quantization out, or load the original checkpoint"
            )
        if quantization == DEQUANTIZE and self.quantization is None:
            quantization = None
        wanted = {"quantization": quantization, "dtype": dtype.name if requested else None}
        for name, value in wanted.items():
            found = getattr(self, name)
            if value in (None, found) or self.exact and (name == "dtype" or found is None):
                continue
            rounded = f"of {', '.join(self.source_dtypes)} to {self.dtype}"
            raise ConfigError(
                f"{name} is {value!r}, but {directory} was converted with {name} {found!r}, which rounded weights "
                f"{f'to {found}' if found and name == 'quantization' else rounded}; leave {name} out, or convert the "
                f"original checkpoint again with --{name} {value}"
            )
        return {
            "quantization": quantization or self.quantization,
            "placement": placement if placement.patterns else Placement(self.placement),
            "pad_heads": pad_heads or self.pad_heads,
        }

    def write(self, directory: Path) -> None:
        """Write the manifest to disk; no file of the folder may change afterwards."""
        body = {"format": "jaxinfer", "version": VERSION, **asdict(self)}
        with open(directory / NAME, "w", encoding="utf-8") as file:
            json.dump(body | {"digest": _digest(body)}, file)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, directory: Path) -> "Manifest | None":
        """Read the manifest of a converted folder; return None for any other checkpoint.

        Raises:
            CheckpointError: the manifest has another version, was changed, or is missing beside converted weights.
        """
        path = directory / NAME
        if not path.is_file():
            if (directory / WEIGHTS).is_dir() and not any(directory.glob("*.safetensors")):
                raise CheckpointError(f"{path} is missing: the conversion to {directory} did not finish; {REMEDY}.")
            return None
        body = read_json(path)
        version = body.get("version")
        if body.get("format") != "jaxinfer" or type(version) is not int or version < 1:
            raise CheckpointError(f"{path} is not the manifest of a converted checkpoint; {REMEDY}.")
        if version > VERSION:
            raise CheckpointError(
                f"{path} has format version {version}, and this jaxinfer reads up to {VERSION}; install a newer "
                "jaxinfer, or convert the original checkpoint again with this one."
            )
        if body.pop("digest", None) != _digest(body):
            raise CheckpointError(f"{path} was changed after the conversion: its digest does not fit it; {REMEDY}.")
        try:
            del body["format"], body["version"]
            stored = {name: Stored.from_json(value) for name, value in body.pop("parameters").items()}
            return cls(parameters=stored, **body)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} lacks or misstates a field ({error}); {REMEDY}.") from error

    def check_files(self, directory: Path, *, contents: bool = False) -> None:
        """Check the folder against the manifest: the size of every file, and the digests of small files.

        Args:
            directory: converted folder.
            contents: whether to check the digests of large files too.

        Raises:
            CheckpointError: a file is missing, truncated or changed; names its path.
        """
        for name, (size, digest) in self.files.items():
            relative = PurePosixPath(name)
            if relative.is_absolute() or ".." in relative.parts:
                raise CheckpointError(f"{directory / NAME} names {name!r}, which lies outside of the folder.")
            path = directory / relative
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                raise CheckpointError(f"{path} is missing; {REMEDY}.")
            if found != size:
                raise CheckpointError(f"{path}: expected {size} bytes, found {found}; {REMEDY}.")
            if (contents or size <= SMALL_BYTES) and file_digest(path) != digest:
                raise CheckpointError(
                    f"{path} was changed or damaged: its digest is not that of the conversion; {REMEDY}."
                )


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(directory: Path) -> Iterator[tuple[str, list[Any]]]:
    """Yield every weight file as an entry of `Manifest.files`."""
    for path in sorted((directory / WEIGHTS).rglob("*")):
        if path.is_file():
            yield path.relative_to(directory).as_posix(), [path.stat().st_size, file_digest(path)]


def fingerprint(reader: Source) -> str:
    """Return a checkpoint's fingerprint: SHA-256 of the name, dtype, shape and first bytes of every tensor."""
    found = hashlib.sha256()
    for name in sorted(reader.names()):
        info = reader.info(name)
        found.update(json.dumps([name, info.dtype, info.shape]).encode())
        values = SAMPLE_BYTES // DTYPES[info.dtype].itemsize
        rows = -(-values // max(1, math.prod(info.shape[1:])))  # a GGUF file's values are dequantised, so as few as do
        part = (slice(min(rows, *info.shape[:1])),) if info.shape else None
        found.update(reader.read(name, part).reshape(-1)[:values].tobytes())
    reader.release()
    return found.hexdigest()
