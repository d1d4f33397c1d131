"""The facts about a tokenizer that detokenisation needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

_LOCAL = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}
"""Decoders that, apart from the beginning and the end of a text, look at one token alone."""


class Vocabulary(NamedTuple):
    """The facts about a tokenizer that detokenisation needs, read once for all requests."""

    special: frozenset[int]
    """Ids that `skip_special_tokens` leaves out."""
    bytes: Mapping[int, int] = {}
    """The byte that each of the tokens <0x00> to <0xFF> stands for, where the decoder has byte fallback."""
    pieces: dict[int, str] | None = None
    """The text of each token that was asked for, as it is inside a text; None if it depends on the tokens before it."""


_vocabularies: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()


def vocabulary(tokenizer: Any) -> Vocabulary:
    """Return the facts about a tokenizer, which take milliseconds to read where it has thousands of added tokens."""
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
    """The Rust tokenizer behind one of transformers; None for those in Python."""
    backend = getattr(tokenizer, "_tokenizer", None)
    return backend if isinstance(backend, Tokenizer) else None


def _decoder_steps(backend: Tokenizer) -> list[dict[str, Any]]:
    """The parts of a tokenizer's decoder, as tokenizer.json has them, in order."""
    steps, left = [], [] if backend.decoder is None else [json.loads(backend.decoder.__getstate__())]
    while left:
        step = left.pop(0)
        if step["type"] == "Sequence":
            left[:0] = step["decoders"]
        else:
            steps.append(step)
    return steps


def _byte_values(backend: Tokenizer, steps: list[dict[str, Any]]) -> dict[int, int]:
    """The bytes of the tokens <0x00> to <0xFF>, if the decoder turns them into bytes."""
    if all(step["type"] != "ByteFallback" for step in steps):
        return {}
    ids = {backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
    return {token: byte for token, byte in ids.items() if token is not None}


def _is_local(steps: list[dict[str, Any]]) -> bool:
    """Whether a token has the same text wherever it is inside a text: so it is with nearly all tokenizers."""
    for step in steps:
        kind = step["type"]
        whole = kind == "Replace" and len(step["pattern"].get("String", "")) != 1
        if kind not in _LOCAL or whole or (kind == "Strip" and step["stop"]):
            return False
    return bool(steps)


def knows_spaces(tokenizer: Any) -> bool:
    """Whether a Python tokenizer's `decode` takes `spaces_between_special_tokens`; that of mistral-common refuses
    it."""
    try:
        tokenizer.decode([], spaces_between_special_tokens=False)
    except (TypeError, ValueError):
        return False
    return True
