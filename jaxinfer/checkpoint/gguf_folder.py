"""Present a GGUF file as a checkpoint folder: its metadata as JSON files in the cache, and a link to the file."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import jaxinfer._utils.cache_dir as cache_dir
from jaxinfer.checkpoint import gguf_config, gguf_file
from jaxinfer.checkpoint.gguf_file import GgufFile
from jaxinfer.checkpoint.gguf_reader import GgufReader
from jaxinfer.checkpoint.safetensors import INDEX, SINGLE, SafetensorsReader

LINK = "model.gguf"
"""Name of the link to the file."""


def is_gguf(path: Path) -> bool:
    """Return whether a file is named like a GGUF file or begins like one."""
    if path.suffix == ".gguf":
        return True
    try:
        with open(path, "rb") as opened:
            return opened.read(len(gguf_file.MAGIC)) == gguf_file.MAGIC
    except OSError:
        return False


def folder_of(path: Path) -> Path:
    """Return a cached folder with the config.json of a GGUF file and a link to it; create it if needed.

    The folder's name includes the versions of the file and of the code, so that its contents are never stale.

    Raises:
        CheckpointError, ConfigError: as `GgufFile` and `gguf_config.config`.
    """
    path = path.expanduser().resolve()
    status = path.stat()
    code = b"".join(Path(module.__file__).read_bytes() for module in (gguf_config, gguf_file))
    key = f"{path}|{status.st_size}|{status.st_mtime_ns}|{hashlib.sha256(code).hexdigest()}"
    cache = cache_dir.cache_folder("gguf")
    folder = cache / f"{path.stem[:64]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if (folder / "config.json").is_file():
        return folder
    file = GgufFile(path)
    files = {"config.json": gguf_config.config(file), "generation_config.json": gguf_config.generation_config(file)}
    made = Path(tempfile.mkdtemp(dir=cache))
    for name, values in files.items():
        (made / name).write_text(json.dumps(values, indent=2), encoding="utf-8")
    (made / LINK).symlink_to(path)
    try:
        os.rename(made, folder)
    except OSError:  # another process was faster
        shutil.rmtree(made)
        if not (folder / "config.json").is_file():
            raise
    return folder


def open_weights(directory: Path) -> SafetensorsReader | GgufReader:
    """Open the weights of a checkpoint folder.

    Raises:
        CheckpointError: they are absent, or a header is invalid.
    """
    link = directory / LINK
    if link.is_symlink() and not (directory / SINGLE).exists() and not (directory / INDEX).exists():
        return GgufReader(link.resolve())
    return SafetensorsReader(directory)
