"""What a converted folder says of itself: `jaxinfer.json`, written last and held against the files when it is read.

It names each parameter with its shape, dtype and layout, so that a folder made for one number of devices can be read
for another, and each file of the weights with its size and digest, so that what is missing or changed is known by name.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxinfer.checkpoint.hf import read_json
from jaxinfer.checkpoint.safetensors import DTYPES, SafetensorsReader
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding import rules as sharding_rules
from jaxinfer.sharding.policy import Placement

NAME, WEIGHTS = "jaxinfer.json", "weights"
"""The manifest, and the folder of Orbax beside it."""
VERSION = 1
"""Of the format. One with a greater number was made by a newer jaxinfer."""
SMALL_BYTES = 1 << 20
"""Files up to this size (Orbax's own metadata and small arrays) are held against their digest at each reading."""
SAMPLE_BYTES = 4096
"""Of each tensor of the source that go into its fingerprint."""
REMEDY = "copy the folder again, or make it again with scripts/convert.py"


@dataclass(frozen=True)
class Stored:
    """One parameter as it lies in the folder."""

    shape: tuple[int, ...]
    dtype: str
    spec: tuple[str | None, ...]
    """The mesh axis of each of its axes."""
    unpadded: tuple[int, ...] | None = None
    """The shape of its tensor in the checkpoint, where that is smaller."""
    rows: Mapping[str, Sequence[Sequence[int]]] | None = None
    """Of a fused parameter `[tp, columns, ...]`: for each output, (shard, first column, start, stop) of the intervals
    of the output's own rows that lie there."""
    columns: Sequence[Sequence[int]] | None = None
    """Of one whose last axis has columns of zeroes: (first column, start, stop) of the intervals of the tensor's
    own."""
    scales_of: str | None = None
    """The path of the int8 parameter whose rows these are the scales of."""
    stacked: bool = False
    """Whether the first axis is one of several such parameters, to which `unpadded`, `rows` and `columns` apply
    alone."""

    @classmethod
    def of(cls, path: str, param: nnx.Param, mesh: Mesh) -> "Stored":
        """From a parameter, values or shapes, and the mesh it is for."""
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
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Stored":
        """As `asdict` gave it."""
        lists = {name: None if value[name] is None else tuple(value[name]) for name in ("shape", "spec", "unpadded")}
        return cls(**{**value, **lists})

    def same_as(self, other: "Stored") -> bool:
        """Whether both hold the same numbers, wherever they lie."""
        return all(
            getattr(self, name) == getattr(other, name) for name in ("shape", "dtype", "unpadded", "rows", "columns")
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
    """Pieces that follow each other here and there as one, so that a layout without padding has none."""
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
    """A converted folder: how it was made, its parameters by path, its files by their paths within it."""

    tensor_parallel_size: int
    placement: Mapping[str, str]
    pad_heads: bool
    quantization: str | None
    dtype: str
    source_dtypes: Sequence[str]
    """Those of the tensors it was made from."""
    source_fingerprint: str
    """sha256 over the names, dtypes, shapes and first bytes of all tensors there."""
    parameters: Mapping[str, Stored]
    files: Mapping[str, Sequence[Any]]
    """Path -> (bytes, sha256)."""

    @property
    def exact(self) -> bool:
        """Whether `dtype` holds every number of the source as it was."""
        kept, kinds = jnp.finfo(self.dtype), map(jnp.dtype, self.source_dtypes)
        found = (jnp.finfo(kind) for kind in kinds if jnp.issubdtype(kind, jnp.floating))
        return all(one.nmant <= kept.nmant and one.nexp <= kept.nexp for one in found)

    def settle(
        self,
        directory: Path,
        dtype: jnp.dtype,
        *,
        asked: bool,
        quantization: str | None,
        placement: Placement,
        pad_heads: bool,
    ) -> dict[str, Any]:
        """Quantisation, placement and padding to run with: what was asked for, else the folder's own.

        `asked`: whether `dtype` was asked for by name.

        Raises:
            ConfigError: the folder's numbers were rounded, and are not those that a dtype or quantisation asked for
                needs.
        """
        wanted = {"quantization": quantization, "dtype": dtype.name if asked else None}
        for name, value in wanted.items():
            found = getattr(self, name)
            if value in (None, found) or self.exact and (name == "dtype" or found is None):
                continue
            rounded = f"of {', '.join(self.source_dtypes)} to {self.dtype}"
            raise ConfigError(
                f"{name} is {value!r}, but {directory} was converted with {name} {found!r}, which rounded weights "
                f"{f'to {found}' if found and name == 'quantization' else rounded}; leave {name} out, or convert the "
                "original "
                f"checkpoint again with --{name} {value}"
            )
        return {
            "quantization": quantization or self.quantization,
            "placement": placement if placement.patterns else Placement(self.placement),
            "pad_heads": pad_heads or self.pad_heads,
        }

    def write(self, directory: Path) -> None:
        """Writes it to disk; nothing of the folder may change afterwards."""
        body = {"format": "jaxinfer", "version": VERSION, **asdict(self)}
        with open(directory / NAME, "w", encoding="utf-8") as file:
            json.dump(body | {"digest": _digest(body)}, file)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, directory: Path) -> "Manifest | None":
        """That of a converted folder; None: the folder is another checkpoint.

        Raises:
            CheckpointError: of another version, changed, or not there beside converted weights; names the file.
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
                "jaxinfer, or "
                "convert the original checkpoint again with this one."
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
        """Holds the folder against the manifest: every file's size, and the digests of small files or of all.

        Raises:
            CheckpointError: a file that is missing, truncated or changed, by its path.
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
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(directory: Path) -> Iterator[tuple[str, list[Any]]]:
    """Every file of the weights as the manifest lists it."""
    for path in sorted((directory / WEIGHTS).rglob("*")):
        if path.is_file():
            yield path.relative_to(directory).as_posix(), [path.stat().st_size, file_digest(path)]


def fingerprint(reader: SafetensorsReader) -> str:
    """Of a checkpoint: sha256 over the name, dtype, shape and first bytes of every tensor."""
    found = hashlib.sha256()
    for name in sorted(reader.names()):
        info = reader.info(name)
        found.update(json.dumps([name, info.dtype, info.shape]).encode())
        found.update(reader.read(name).reshape(-1)[: SAMPLE_BYTES // DTYPES[info.dtype].itemsize].tobytes())
    reader.release()
    return found.hexdigest()
