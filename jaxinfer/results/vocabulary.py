"""Read the tokenizer data that detokenization needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

_LOCAL = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}
"""Decoder types that decode each token on its own, except at the start and end of a text."""


class Vocabulary(NamedTuple):
    """Tokenizer data that detokenization needs, read once per tokenizer."""

    special: frozenset[int]
    """Ids that `skip_special_tokens` leaves out."""
    bytes: Mapping[int, int] = {}
    """Byte token id -> byte, for the tokens <0x00> to <0xFF> of decoders with byte fallback."""
    pieces: dict[int, str] | None = None
    """Cache of token id -> text inside a text; None if the text of a token depends on the tokens before it."""


_vocabularies: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()


def vocabulary(tokenizer: Any) -> Vocabulary:
    """Return a tokenizer's data, cached because reading thousands of added tokens takes milliseconds."""
    found = _vocabularies.get(tokenizer)
    if found is None:
        backend = backend_of(tokenizer)
        if backend is None:
            found = Vocabulary(frozenset(tokenizer.all_special_ids))
        else:
            special = (token for token, added in backend.get_added_tokens_decoder().items() if added.special)
            steps = _decoder_steps(backend)
            found = Vocabulary(frozenset(special), _byte_values(backend, steps), {} if _is_local(steps) else None)
        _vocabularies[tokenizer] = found
    return found


def backend_of(tokenizer: Any) -> Tokenizer | None:
    """Return the Rust backend of a transformers tokenizer; None for Python tokenizers."""
    backend = getattr(tokenizer, "_tokenizer", None)
    return backend if isinstance(backend, Tokenizer) else None


def _decoder_steps(backend: Tokenizer) -> list[dict[str, Any]]:
    """Return the steps of a tokenizer's decoder as in tokenizer.json, with sequences flattened."""
    steps, left = [], [] if backend.decoder is None else [json.loads(backend.decoder.__getstate__())]
    while left:
        step = left.pop(0)
        if step["type"] == "Sequence":
            left[:0] = step["decoders"]
        else:
            steps.append(step)
    return steps


def _byte_values(backend: Tokenizer, steps: list[dict[str, Any]]) -> dict[int, int]:
    """Return byte token id -> byte for the tokens <0x00> to <0xFF>; empty without byte fallback."""
    if all(step["type"] != "ByteFallback" for step in steps):
        return {}
    ids = {backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
    return {token: byte for token, byte in ids.items() if token is not None}


def _is_local(steps: list[dict[str, Any]]) -> bool:
    """Return whether a token has the same text anywhere inside a text, as with nearly all tokenizers."""
    for step in steps:
        kind = step["type"]
        whole = kind == "Replace" and len(step["pattern"].get("String", "")) != 1
        if kind not in _LOCAL or whole or (kind == "Strip" and step["stop"]):
            return False
    return bool(steps)


def knows_spaces(tokenizer: Any) -> bool:
    """Return whether a Python tokenizer's `decode` accepts `spaces_between_special_tokens` (mistral-common: no)."""
    try:
        tokenizer.decode([], spaces_between_special_tokens=False)
    except (TypeError, ValueError):
        return False
    return True
