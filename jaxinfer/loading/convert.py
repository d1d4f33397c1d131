"""Convert a checkpoint's folder to one with weights fused, sharded and quantised as they are on devices."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from tqdm.auto import tqdm

from jaxinfer._utils.checks import FP8
from jaxinfer.checkpoint import orbax, rules
from jaxinfer.checkpoint.gguf_folder import open_weights
from jaxinfer.checkpoint.hf import read_config
from jaxinfer.checkpoint.manifest import NAME, WEIGHTS, Manifest, Stored, files_of, fingerprint
from jaxinfer.checkpoint.safetensors_header import DTYPES
from jaxinfer.checkpoint.source import Source
from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.inputs import gguf_tokenizer
from jaxinfer.inputs.tokenizer import load_tokenizer
from jaxinfer.loading import quantised, weights
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding.policy import Placement

COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken")
"""Suffixes of other files that are copied: configurations, tokenizers, chat templates."""
TEMPLATES = "additional_chat_templates"
"""Folder of additional chat templates, as written by transformers."""


def convert(
    directory: Path,
    out: Path,
    mesh: Mesh,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    placement: Placement = Placement(),
    pad_heads: bool = False,
    overrides: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Manifest:
    """Write the weights, as laid out on the devices of `mesh`, to folder `out`, which `loading.load` can restore.

    Peak host memory for weights is about the size of the largest parameter. `out` is created by renaming when
    everything is written; an interrupted conversion leaves `.NAME.partial` beside it, without a manifest, which the
    next one removes.

    Args:
        directory: folder of the original checkpoint.
        out: folder to create; it must not exist or be empty.
        mesh: mesh whose devices the layout is made for.
        dtype, placement, pad_heads: as for `loading.weights.load`.
        quantization: "int8" or None; weights that the checkpoint has in fewer bits are converted to `dtype`.
        overrides: values merged into the config.json of `out`, so that they need not be passed again.
        progress: whether a progress bar is shown.

    Returns:
        The manifest, as written to `out`.

    Raises:
        ConfigError: as `loading.load`.
        CheckpointError: the checkpoint does not match its configuration, the folder exists already, or the disk is
            full.
    """
    if Manifest.read(directory) is not None:
        raise CheckpointError(f"{directory} is a converted checkpoint already; convert the original checkpoint.")
    model_family, config = weights.parse(hf := read_config(directory, overrides), directory)
    mesh = meshes.normalise(mesh)
    if quantization == FP8:
        raise ConfigError(
            f"quantization is {FP8!r}, which converted folders do not have; convert with 'int8', or without "
            f"quantization, and pass {FP8!r} where the original checkpoint is loaded"
        )
    quantization = quantised.applied(quantization, hf, directory)
    how = dict(quantization=quantization, placement=placement, pad_heads=pad_heads)
    with open_weights(directory) as reader, _new_folder(out) as folder:
        # Keep the stored dtype: this machine's preference does not matter where the folder is loaded.
        kind = weights.resolve_dtype(dtype, weights.config_dtype(hf) or weights.stored_dtype(reader), "", model_family)
        config, source = weights.match_tensors(model_family, config, hf, reader, directory)
        module = weights.abstract(model_family, config, kind, mesh, **how)
        wanted = rules.parameters(module)
        planned = rules.plan(wanted, model_family.weight_rules(config), source, directory)
        _write(folder, wanted, planned, source, mesh, progress)
        _copy_others(directory, folder)
        if overrides:
            _write_config(folder, hf)
        manifest = Manifest(
            meshes.size(mesh),
            dict(placement.patterns),
            pad_heads,
            quantization,
            kind.name,
            sorted({DTYPES[source.info(rule.source).dtype].name for filled in planned.values() for rule in filled}),
            fingerprint(reader),
            {path: Stored.of(path, param, mesh) for path, param in wanted.items()},
            dict(files_of(folder)),
        )
        manifest.write(folder)
    return manifest


def _write_config(folder: Path, hf: Mapping[str, Any]) -> None:
    """Write config.json with the overrides in it."""
    values = {name: value for name, value in hf.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")


def _write(
    folder: Path,
    wanted: Mapping[str, nnx.Param],
    planned: Mapping[str, list[Rule]],
    source: Source,
    mesh: Mesh,
    progress: bool,
) -> None:
    """Read and write the weights, a group of parameters at a time."""
    sizes = {path: rules.nbytes(wanted[path]) for path in planned}
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if total > free:
        raise CheckpointError(
            f"{folder.parent} has {free} bytes free, but the weights need {total}; free space, or write elsewhere."
        )
    int8 = rules.int8_source(wanted, planned, source)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Converting weights", disable=not progress) as bar:
        for group in orbax.groups({path: wanted[path] for path in planned}, max(sizes.values())):
            parts = {path: planned[path] for path in group}
            orbax.save(folder / WEIGHTS, dict(rules.read(wanted, parts, source, mesh, int8)))
            bar.update(sum(sizes[path] for path in group))
    orbax.finalize(folder / WEIGHTS)


def _copy_others(directory: Path, folder: Path) -> None:
    """Copy all files the model needs beside its weights, except indices of weight files."""
    for path in sorted([*directory.iterdir(), *directory.glob(f"{TEMPLATES}/*")]):
        if path.is_file() and path.suffix in COPIED and not path.name.endswith(".index.json") and path.name != NAME:
            target = folder / path.relative_to(directory)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    if gguf_tokenizer.applies_to(directory):
        load_tokenizer(directory).save_pretrained(folder)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out`, which is renamed to `out` on success and removed on failure.

    It is locked while it is written; the lock ends with the process, so that leftovers of an interrupted conversion can
    be removed.

    Raises:
        CheckpointError: `out` exists already, or another process is writing it.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; choose another folder, or remove it.")
    folder = out.with_name(f".{out.name}.partial")
    lock = _lock(folder)
    try:
        _clear(folder)
        yield folder
        os.fsync(lock)
        os.rename(folder, out)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}.") from error
    finally:
        os.close(lock)


def _lock(folder: Path) -> int:
    """Create and lock the folder; return the descriptor that holds the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be created: {error.strerror or error}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(folder)):  # another process may have renamed it meanwhile
            return lock
    except OSError:
        pass
    os.close(lock)
    raise CheckpointError(f"{folder} is being written by another conversion; wait for it, or choose another folder.")


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
