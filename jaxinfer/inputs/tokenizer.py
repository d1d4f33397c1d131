"""Load tokenizers and encode texts."""

import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jaxinfer._utils.transformers import from_transformers
from jaxinfer.checkpoint.hub import resolve_model
from jaxinfer.checkpoint.plain_json import shorten
from jaxinfer.checkpoint.tokenizer_errors import as_checkpoint_error, is_library_error
from jaxinfer.errors import CheckpointError
from jaxinfer.inputs import gguf_tokenizer, tekken, tiktoken, tokenizer_files, vocabulary_files

log = logging.getLogger(__name__)

GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names of the generic class, whose behaviour is defined by tokenizer.json alone."""


def load_tokenizer(source: str | Path | Any) -> Any:
    """Load a transformers tokenizer from a directory, GGUF file or Hub id; a tokenizer object is returned unchanged.

    No checkpoint code is run: a tokenizer class that only exists in the checkpoint is replaced by its tokenizer.json
    or, for Moonshot's class, by tiktoken.model (`tiktoken`). Mistral's tekken.json is also read as data (`tekken`),
    whether or not mistral-common is installed.

    Raises:
        CheckpointError: the folder has no tokenizer, or its files are broken; the error names the file and the field.
        TypeError: `source` is neither a path, a Hub id nor a tokenizer.
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
        _check_round_trip(made, directory)
    return made


def _load(directory: Path) -> Any:
    for own in (gguf_tokenizer, tekken, tiktoken):
        if own.applies_to(directory):
            return _from_data(directory, own)
    vocabulary_files.check_vocabulary(directory)
    try:
        made = _from_library(directory)
    except BaseException as error:  # transformers raises many exception types
        if not is_library_error(error):
            raise
        raise tokenizer_files.explain(directory, error) from error
    if (directory / vocabulary_files.SENTENCEPIECE).is_file() and not (directory / tokenizer_files.TOKENIZER).is_file():
        made = _match_sentencepiece(made, directory)
    if getattr(made, "chat_template", None) is None:
        made.chat_template = tokenizer_files.chat_template(directory)
    return made


def _from_library(directory: Path) -> Any:
    """Load the tokenizer of a folder with transformers."""
    whole = (directory / "tokenizer.json").is_file()
    # If tekken.json is there as well and mistral-common is installed, AutoTokenizer would prefer tekken.json.
    if _is_generic(directory) or (whole and (directory / tekken.FILE).is_file()):
        return from_transformers("PreTrainedTokenizerFast").from_pretrained(directory)
    try:
        return from_transformers("AutoTokenizer").from_pretrained(directory, trust_remote_code=False)
    except BaseException as error:
        if not whole or not is_library_error(error):
            raise
        made = from_transformers("PreTrainedTokenizerFast").from_pretrained(directory)
        log.info("%s: tokenizer.json is taken as it is, since its own class cannot be used (%s).", directory, error)
        return made


def _match_sentencepiece(made: Any, directory: Path) -> Any:
    """Return a conversion of tokenizer.model that encodes like SentencePiece: `made`, else the generic conversion.

    The tokenizer classes of some models, such as Llama, assume merges and a normalisation that the file may not have.

    Raises:
        CheckpointError: neither conversion encodes like SentencePiece.
    """
    if vocabulary_files.agrees_with_sentencepiece(made, directory):
        return made
    ends = {name: bool(getattr(made, name, False)) for name in ("add_bos_token", "add_eos_token")}
    generic = from_transformers("PreTrainedTokenizerFast").from_pretrained(directory, **ends)
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
    """Load a tokenizer from a format that jaxinfer reads itself; `own`: its module, such as `tekken`."""
    backend, known = own.backend(directory)
    template = tokenizer_files.chat_template(directory)
    if template is not None:
        known["chat_template"] = template
    log.info("%s is read as data; code of the checkpoint is not run.", directory / own.FILE)
    return from_transformers("PreTrainedTokenizerFast")(tokenizer_object=backend, **known)


def _check_round_trip(tokenizer: Any, directory: Path) -> None:
    """Encode and decode a text, so that a broken tokenizer fails at load time and not in a request.

    Raises:
        CheckpointError: the vocabulary is empty.
    """
    if not tokenizer.get_vocab():
        raise CheckpointError(
            f"the tokenizer of {directory} has no tokens: the vocabulary of its files is empty; fetch them again."
        )
    tokenizer.decode(tokenizer.encode("a", add_special_tokens=True), clean_up_tokenization_spaces=False)


def _is_generic(directory: Path) -> bool:
    """Return whether `AutoTokenizer` would use the generic class.

    Skipping `AutoTokenizer` saves the import of torch, which takes seconds. `AutoTokenizer` replaces the generic class
    by a specific one for some model types, but never for Llama.
    """
    try:
        model, declared = (
            json.loads((directory / name).read_text()) for name in ("config.json", "tokenizer_config.json")
        )
        own = declared.get("auto_map") or declared.get("tokenizer_class") not in GENERIC
        return not own and model.get("model_type") == "llama" and (directory / "tokenizer.json").is_file()
    except (OSError, ValueError, AttributeError):
        return False


def id_bound(tokenizer: Any) -> int:
    """Return the highest token id of the tokenizer plus 1."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def longest_token(tokenizer: Any) -> int:
    """Return the length of the longest token, in characters."""
    return max(map(len, tokenizer.get_vocab()), default=1)


def encodes_batches(tokenizer: Any) -> bool:
    """Return whether `encode_batch` gives the ids of `encode`: a Rust backend, and `encode` is not overridden."""
    method = getattr(type(tokenizer), "encode", None)
    return (
        getattr(tokenizer, "is_fast", False) is True
        and method is not None
        and (method.__qualname__ == "PreTrainedTokenizerBase.encode")
    )


def encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Encode a text to token ids; `special`: whether the tokenizer adds its special tokens.

    Raises:
        CheckpointError: the tokenizer fails on this text.
    """
    with as_checkpoint_error(f"the tokenizer cannot encode {shorten(repr(text), 60)}"):
        return tokenizer.encode(text, add_special_tokens=special)


def encode_batch(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    """Encode each text to token ids as `encode` does, but on all processors."""
    if not texts:
        return []
    with as_checkpoint_error(f"the tokenizer cannot encode one of {len(texts)} texts"):
        return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False)[
            "input_ids"
        ]
