"""Loading a tokenizer, and what is known of it before text comes."""

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.hub import resolve_model
from jaxinfer.errors import CheckpointError


def load_tokenizer(source: str | Path | Any) -> Any:
    """A transformers tokenizer from a directory or Hub id; a tokenizer is given back as it is.

    No code of the checkpoint is run: a tokenizer class that only exists there is replaced by its
    tokenizer.json.

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
    auto, fast = _classes()
    try:
        return auto.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        if (directory / "tokenizer.json").is_file():
            return fast.from_pretrained(directory)
        raise CheckpointError(
            f"no tokenizer in {directory}: {type(error).__name__}: {error}. Pass tokenizer=DIR, or "
            "skip_tokenizer_init=True to serve token ids"
        ) from error


def _classes() -> tuple[Any, Any]:
    """Imported when needed: transformers takes seconds, and serving token ids needs none of it."""
    disabled = logging.root.manager.disable
    # It warns on import that there is no torch, of which nothing here has need.
    logging.disable(logging.WARNING)
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    finally:
        logging.disable(disabled)
    return AutoTokenizer, PreTrainedTokenizerFast


def id_bound(tokenizer: Any) -> int:
    """One more than the highest token id the tokenizer knows."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


@lru_cache(maxsize=4)
def longest_token(tokenizer: Any) -> int:
    """Characters of the longest token."""
    return max(map(len, tokenizer.get_vocab()), default=1)
