"""Loading a tokenizer, and what is known of it before text comes."""

import importlib
import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jaxinfer.checkpoint.hub import resolve_model
from jaxinfer.checkpoint.plain_json import shorten
from jaxinfer.checkpoint.tokenizer_errors import as_checkpoint_error, is_library_error
from jaxinfer.errors import CheckpointError
from jaxinfer.inputs import tekken, tiktoken, tokenizer_files, vocabulary_files

log = logging.getLogger(__name__)

GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names of the class that is what tokenizer.json says and nothing else."""


def load_tokenizer(source: str | Path | Any) -> Any:
    """Load a transformers tokenizer from a directory or Hub id; a tokenizer is given back as it is.

    No code of the checkpoint is run: a tokenizer class that only exists there is replaced by its tokenizer.json or, of
    Moonshot's, by what its tiktoken.model says (`tiktoken`). Mistral's tekken.json is read as data as well
    (`tekken`), whether or not mistral-common is installed.

    Raises:
        CheckpointError: there is none to load, or its files are broken; names the file and the field.
        TypeError: something else.
    """
    if not isinstance(source, (str, Path)):
        if not hasattr(source, "get_vocab"):
            raise TypeError(f"tokenizer must be a directory, a Hub id or a tokenizer, got {type(source).__name__}")
        if isinstance(source, Tokenizer):
            raise TypeError(
                "tokenizer must be one of transformers, got a tokenizers.Tokenizer: wrap it as "
                "PreTrainedTokenizerFast(tokenizer_object=...)."
            )
        return source
    try:
        directory = resolve_model(source)
    except CheckpointError as error:
        raise CheckpointError(f"tokenizer={str(source)!r}: {error}") from error
    tokenizer_files.check(directory)
    with as_checkpoint_error(f"the tokenizer of {directory} could not be read"):
        made = _load(directory)
    with as_checkpoint_error(f"the tokenizer of {directory} cannot be used"):
        _try_out(made, directory)
    return made


def _load(directory: Path) -> Any:
    for own in (tekken, tiktoken):
        if own.is_kept_so(directory):
            return _from_data(directory, own)
    vocabulary_files.check_vocabulary(directory)
    try:
        made = _from_library(directory)
    except BaseException as error:  # transformers raises many kinds
        if not is_library_error(error):
            raise
        raise tokenizer_files.explain(directory, error) from error
    if (directory / vocabulary_files.SENTENCEPIECE).is_file() and not (directory / tokenizer_files.TOKENIZER).is_file():
        made = _faithful(made, directory)
    if getattr(made, "chat_template", None) is None:
        made.chat_template = tokenizer_files.chat_template(directory)
    return made


def _from_library(directory: Path) -> Any:
    """The tokenizer that transformers makes of a folder."""
    whole = (directory / "tokenizer.json").is_file()
    # Where tekken.json is there as well, AutoTokenizer would take it if mistral-common is installed.
    if _is_generic(directory) or (whole and (directory / tekken.FILE).is_file()):
        return _import("PreTrainedTokenizerFast").from_pretrained(directory)
    try:
        return _import("AutoTokenizer").from_pretrained(directory, trust_remote_code=False)
    except BaseException as error:
        if not whole or not is_library_error(error):
            raise
        made = _import("PreTrainedTokenizerFast").from_pretrained(directory)
        log.info("%s: tokenizer.json is taken as it is, since its own class cannot be used (%s).", directory, error)
        return made


def _faithful(made: Any, directory: Path) -> Any:
    """Return what was converted from tokenizer.model if it gives SentencePiece's tokens, else a conversion that does.

    The classes of some models, Llama's among them, assume merges and a normalisation that the file may not have.

    Raises:
        CheckpointError: there is none.
    """
    if vocabulary_files.agrees_with_sentencepiece(made, directory):
        return made
    ends = {name: bool(getattr(made, name, False)) for name in ("add_bos_token", "add_eos_token")}
    generic = _import("PreTrainedTokenizerFast").from_pretrained(directory, **ends)
    if not vocabulary_files.agrees_with_sentencepiece(generic, directory):
        raise CheckpointError(
            f"transformers' conversion of {directory / vocabulary_files.SENTENCEPIECE} gives other tokens than "
            "SentencePiece: give the tokenizer.json of this model."
        )
    log.info(
        "%s: %s of transformers gives other tokens than SentencePiece; the model file is taken as it is.",
        directory,
        type(made).__name__,
    )
    return generic


def _from_data(directory: Path, own: Any) -> Any:
    """The tokenizer of a folder that has it in a format of its own.

    `own`: the module that reads the format.
    """
    backend, known = own.backend(directory)
    template = tokenizer_files.chat_template(directory)
    if template is not None:
        known["chat_template"] = template
    log.info("%s is read as data; code of the checkpoint is not run.", directory / own.FILE)
    return _import("PreTrainedTokenizerFast")(tokenizer_object=backend, **known)


def _try_out(tokenizer: Any, directory: Path) -> None:
    """Use what every request uses.

    Raises:
        CheckpointError: it has no tokens.
    """
    if not tokenizer.get_vocab():
        raise CheckpointError(f"the tokenizer of {directory} has no tokens: the vocabulary of its files is empty.")
    tokenizer.decode(tokenizer.encode("a", add_special_tokens=True), clean_up_tokenization_spaces=False)


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


def encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Return the token ids of a text; `special`: whether the tokenizer adds its special tokens.

    Raises:
        CheckpointError: the tokenizer fails on this text.
    """
    with as_checkpoint_error(f"the tokenizer cannot encode {shorten(repr(text), 60)}"):
        return tokenizer.encode(text, add_special_tokens=special)


def encode_batch(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    """Return the token ids of each text, as `encode` does."""
    if not texts:
        return []
    with as_checkpoint_error(f"the tokenizer cannot encode one of {len(texts)} texts"):
        return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False)[
            "input_ids"
        ]
