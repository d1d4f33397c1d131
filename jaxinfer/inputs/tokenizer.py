"""Loading a tokenizer, and what is known of it before text comes."""

import importlib
import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.hub import resolve_model
from jaxinfer.errors import CheckpointError
from jaxinfer.inputs import tiktoken as tiktoken_file

log = logging.getLogger(__name__)

GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names of the class that is what tokenizer.json says and nothing else."""


def load_tokenizer(source: str | Path | Any) -> Any:
    """A transformers tokenizer from a directory or Hub id; a tokenizer is given back as it is.

    No code of the checkpoint is run: a tokenizer class that only exists there is replaced by its tokenizer.json or, of
    Moonshot's, by what its tiktoken.model says (`tiktoken_file`).

    Raises:
        CheckpointError: there is none to load.
        TypeError: something else.
    """
    if not isinstance(source, (str, Path)):
        if not hasattr(source, "get_vocab"):
            raise TypeError(f"tokenizer must be a directory, a Hub id or a tokenizer, got {type(source).__name__}")
        return source
    try:
        directory = resolve_model(source)
    except CheckpointError as error:
        raise CheckpointError(f"tokenizer={str(source)!r}: {error}") from error
    if tiktoken_file.is_kept_so(directory):
        return _from_ranks(directory)
    try:
        loader = _import("PreTrainedTokenizerFast" if _is_generic(directory) else "AutoTokenizer")
        return loader.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        if (directory / "tokenizer.json").is_file():
            return _import("PreTrainedTokenizerFast").from_pretrained(directory)
        raise CheckpointError(
            f"no tokenizer in {directory}: {type(error).__name__}: {error}. Pass tokenizer=DIR, or "
            "skip_tokenizer_init=True to serve token ids"
        ) from error


def _from_ranks(directory: Path) -> Any:
    """The tokenizer of a folder with tiktoken.model."""
    backend, known = tiktoken_file.backend(directory)
    template = directory / "chat_template.jinja"
    if template.is_file():
        known["chat_template"] = template.read_text(encoding="utf-8")
    log.info("%s names code of its own for its tokenizer: not run; %s is read as data.", directory, tiktoken_file.FILE)
    return _import("PreTrainedTokenizerFast")(tokenizer_object=backend, **known)


def _is_generic(directory: Path) -> bool:
    """Whether `AutoTokenizer` would take tokenizer.json as it is; importing it brings in torch, which takes seconds.

    For some types of models it puts a class of its own in the place of the generic one, for Llama never.
    """
    try:
        model, declared = (
            json.loads((directory / name).read_text()) for name in ("config.json", "tokenizer_config.json")
        )
        own = declared.get("auto_map") or declared.get("tokenizer_class") not in GENERIC
        return not own and model.get("model_type") == "llama" and (directory / "tokenizer.json").is_file()
    except (OSError, ValueError, AttributeError):
        return False


def _import(name: str) -> Any:
    """A class of transformers, imported when needed: serving token ids needs none of it."""
    disabled = logging.root.manager.disable
    # It warns on import that there is no torch, of which nothing here has need.
    logging.disable(logging.WARNING)
    try:
        return getattr(importlib.import_module("transformers"), name)
    finally:
        logging.disable(disabled)


def id_bound(tokenizer: Any) -> int:
    """One more than the highest token id the tokenizer knows."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


@lru_cache(maxsize=4)
def longest_token(tokenizer: Any) -> int:
    """Characters of the longest token."""
    return max(map(len, tokenizer.get_vocab()), default=1)


def encodes_batches(tokenizer: Any) -> bool:
    """Whether `encode_batch` gives what the tokenizer's own `encode` gives: it has a Rust backend, and no `encode` of
    its own."""
    method = getattr(type(tokenizer), "encode", None)
    return (
        getattr(tokenizer, "is_fast", False) is True
        and method is not None
        and (method.__qualname__ == "PreTrainedTokenizerBase.encode")
    )


def encode_batch(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    """Return the token ids of each text; `special`: whether the tokenizer adds its special tokens."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False)[
        "input_ids"
    ]
