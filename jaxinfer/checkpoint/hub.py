"""Resolve a model to a local folder: a directory, a GGUF file presented as one (`checkpoint.gguf_folder`), or a Hub id
downloaded by huggingface_hub into its cache."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from jaxinfer.checkpoint import gguf_folder, packaged
from jaxinfer.errors import CheckpointError, OfflineError

ALLOW_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
"""Files downloaded from a repository: configurations, weights, tokenizers and chat templates, but no code."""

IGNORE_PATTERNS = ("*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt", "consolidated*.safetensors")
"""Files excluded from the download: copies of the weights in other formats, which some repositories also hold."""


def resolve_model(model: str | Path, revision: str | None = None, *, patterns: Sequence[str] = ALLOW_PATTERNS) -> Path:
    """Return the folder of a model; download it from the Hub unless it is a local directory or GGUF file.

    huggingface_hub honours HF_HOME, HF_HUB_OFFLINE and HF_TOKEN.

    Args:
        model: local directory or GGUF file, a name of `packaged.MODELS`, or a Hub id.
        revision: branch, tag or commit of the Hub repository.
        patterns: glob patterns of the files to download.

    Raises:
        CheckpointError: a local path is neither a directory nor a valid GGUF file, or the name is no Hub id either.
        ConfigError: the architecture of a GGUF file, or a value in it, is not supported.
        OfflineError: the Hub cannot serve the model; says what to do.
    """
    if not isinstance(model, (str, Path)):
        raise TypeError(f"model must be a directory or a Hub id, found {type(model).__name__}.")
    path = Path(model).expanduser()
    if str(model) and path.is_dir():
        return path
    if model in packaged.MODELS:
        return gguf_folder.folder_of(packaged.path_of(model))
    if path.is_file():
        if gguf_folder.is_gguf(path):
            return gguf_folder.folder_of(path)
        raise CheckpointError(f"model={str(model)!r} is a file; pass the directory that holds config.json.")
    if not str(model) or isinstance(model, Path) or _looks_local(model):
        raise CheckpointError(f"model={str(model)!r}: the file or directory does not exist (seen from {Path.cwd()}).")
    return _fetch(model, revision, patterns)


def _looks_local(model: str) -> bool:
    return model.startswith((".", "/", "~", os.sep)) or model.endswith(("/", ".gguf")) or model.count("/") > 1


def _fetch(model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    # Imported lazily: a local directory does not need the library, and importing it takes time.
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=[*patterns], ignore_patterns=[*IGNORE_PATTERNS]
            )
        )
    except HFValidationError as error:
        raise CheckpointError(f"model={model!r} is neither a directory nor a Hub id (owner/name).") from error
    except Exception as error:  # The client, its HTTP library and its transfer library raise errors of their own.
        raise OfflineError(
            f"model={model!r} is not a directory here and cannot be downloaded from the Hugging Face Hub: "
            f"{_reason(error, model, revision)} Or fetch it on another machine "
            f"(`hf download {model} --local-dir DIR`), copy DIR here and pass its path as the model."
        ) from error


def _reason(error: Exception, model: str, revision: str | None) -> str:
    """Describe the cause of a failed download and its remedy, in two sentences."""
    from huggingface_hub import constants, errors

    cache = constants.HF_HUB_CACHE
    if _errno(error) in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk that holds {cache} is full. Make room there, or set HF_HOME to a folder on "
            "another disk; the download goes on where it stopped."
        )
    if isinstance(error, errors.GatedRepoError):
        return (
            f"access to it is gated. Accept its conditions at https://huggingface.co/{model}, then run "
            "`hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such public model. Check the name; if it is private, run `hf auth login` or set HF_TOKEN."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}. Pass a branch, tag or commit that it has."
    if constants.HF_HUB_OFFLINE:
        return (
            f"HF_HUB_OFFLINE is set and {cache} does not hold all of it. Unset HF_HUB_OFFLINE, or set "
            "HF_HOME to the folder of a cache that does."
        )
    cause = (str(error).strip() or "no message").splitlines()[0]
    return (
        f"{type(error).__name__}: {cause} Check the connection (HF_ENDPOINT and proxies included), or "
        "set HF_HOME to the folder of a cache that holds it."
    )


def _errno(error: BaseException | None) -> int | None:
    """Return the first operating system error number in a chain of exceptions."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None
