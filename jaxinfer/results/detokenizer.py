"""Incremental detokenization: emit each character as soon as its last token arrives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.checkpoint.tokenizer_errors import REMEDY, cause, is_library_error
from jaxinfer.errors import CheckpointError
from jaxinfer.results.vocabulary import backend_of, knows_spaces, vocabulary

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
"""Maximum bytes of a character in UTF-8; an incomplete character has at most three."""
_WINDOW = 4
"""Window length, in tokens, at which the window is first shortened."""
_CONTEXTS = (1, 4, 8)
"""Numbers of preceding tokens to try as decoding context of new tokens; the first that has text and contains all text
not yet emitted is used."""
_PROMPT = 4
"""Number of prompt tokens used as decoding context of the output; more if these have no text."""


class _State(NamedTuple):
    """Decoding state of one text; immutable, so that `peek` can decode a token without committing it."""

    window: tuple[int, ...] = ()
    """Last tokens of the text: context tokens with emitted text, then all tokens whose text is not yet emitted."""
    text: str = ""
    """Decoded text of the window."""
    given: int = 0
    """Number of characters of `text` already emitted."""
    settled: int = 0
    """Number of tokens of the window whose text is emitted completely."""
    limit: int = _WINDOW
    """Window length, in tokens, at which the window is shortened."""
    partial: tuple[int, ...] = ()
    """Byte tokens of an incomplete character."""
    broken: bool = False
    """Whether the run of byte tokens at the end of the text is invalid UTF-8."""
    shown: str = ""
    """Replacement characters at the end of the prompt's text that the output may still complete to characters."""


class Detokenizer:
    """Incremental detokenizer of one sequence.

    The pieces concatenate to the text that `tokenizer.decode(prompt + output, skip_special_tokens=...,
    clean_up_tokenization_spaces=False)` adds to the text of `prompt`, however the tokens are divided into pushes. A
    character is emitted with its last token. If the sequence ends inside a character, `finish` returns the replacement
    characters that `decode` returns.

    The pieces differ from `decode` in one case: a decoder with byte fallback (Llama 2, Gemma) replaces every byte of a
    run of byte tokens if one byte is invalid. Characters of the run emitted before the invalid byte are kept. Emitted
    text is also kept for tokenizers whose decoded prefix is not a prefix of the decoded whole.

    Each token costs the decoding of about four tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        prompt: Sequence[int] | np.ndarray = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        """Start a text after a prompt.

        Args:
            tokenizer: transformers tokenizer; its Rust backend is used if it has one.
            prompt: token ids that the text continues. Its last tokens decide, for instance, whether the first word
                keeps its leading space.
            skip_special_tokens: whether to leave special tokens out of the text.
            spaces_between_special_tokens: passed to Python tokenizers that support it; ignored with a Rust backend.
        """
        self._tokenizer = tokenizer
        self._backend = backend_of(tokenizer)
        self._vocabulary = vocabulary(tokenizer)
        self._skips = skip_special_tokens
        self._options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        if self._backend is None and not spaces_between_special_tokens and knows_spaces(tokenizer):
            self._options["spaces_between_special_tokens"] = False
        self._state = _State()
        if len(prompt):
            self._read(prompt)

    def push(self, token_ids: Iterable[int]) -> str:
        """Append tokens and return the text that they complete."""
        pieces = []
        for token in token_ids:
            self._state, piece = self._step(self._state, int(token))
            pieces.append(piece)
        return "".join(pieces)

    def peek(self, token: int) -> str:
        """Return the text that `push([token])` would return, without appending the token."""
        state, pieces = self._state, self._vocabulary.pieces
        complete = 0 < state.given == len(state.text) and not state.partial and not state.shown
        if pieces is None or not complete or token in self._vocabulary.bytes or self.skips(token):
            return self._step(state, token)[1]
        if token not in pieces:
            pieces[token] = self._step(state, token)[1]
        return pieces[token]

    def finish(self) -> str:
        """Return the rest of the text at the end of the sequence."""
        state = self._state
        rest = state.text[state.given :] + _REPLACEMENT * len(state.partial)
        self._state, rest = _pass_shown(state._replace(given=len(state.text), partial=()), rest)
        return rest

    def skips(self, token: int) -> bool:
        """Return whether a token is a special token that is left out of the text."""
        return self._skips and token in self._vocabulary.special

    def special_text(self, token: int) -> str | None:
        """Return the text of a special token, even if special tokens are skipped; None for other tokens."""
        if token not in self._vocabulary.special:
            return None
        return self._backend.id_to_token(token) if self._backend else self._tokenizer.convert_ids_to_tokens(token)

    def _read(self, prompt: Sequence[int] | np.ndarray) -> None:
        """Load the last tokens of the prompt as context; a run of byte tokens at its end is loaded from its start."""
        kept: list[int] = []
        for token in map(int, reversed(prompt)):
            if self._is_left_out(token):
                continue
            enough = len(kept) >= _PROMPT and kept[-1] not in self._vocabulary.bytes
            if enough and (len(kept) >= 8 * _PROMPT or self._decode(kept[::-1])):
                break
            kept.append(token)
        self.push(kept[::-1])
        state = self._state
        self._state = state._replace(shown=state.text[state.given :] + _REPLACEMENT * len(state.partial))

    def _is_left_out(self, token: int) -> bool:
        """Return whether a token has no text: a skipped special token, or an id unknown to the tokenizer."""
        return self.skips(token) or (self._backend is not None and self._backend.id_to_token(token) is None)

    def _step(self, state: _State, token: int) -> tuple[_State, str]:
        """Return the state after one more token, and the text that it completes."""
        if self._is_left_out(token):
            return state, ""
        if token in self._vocabulary.bytes:
            state, text = self._step_byte(state, token)
        else:
            state, broken = self._break(state) if state.partial else (state, "")
            state, text = self._extend(state._replace(broken=False), (token,))
            text = broken + text
        return _pass_shown(state, text) if state.shown else (state, text)

    def _step_byte(self, state: _State, token: int) -> tuple[_State, str]:
        """Append a byte token. `tokenizers` decodes a run of byte tokens as a unit, so decode only whole characters."""
        if state.broken:
            return state, _REPLACEMENT
        partial = (*state.partial, token)
        try:
            bytes(self._vocabulary.bytes[one] for one in partial).decode()
        except UnicodeDecodeError as error:
            state = state._replace(partial=partial)
            return (state, "") if error.reason == "unexpected end of data" else self._break(state)
        return self._extend(state._replace(partial=()), partial)

    def _break(self, state: _State) -> tuple[_State, str]:
        """Replace each byte of an invalid character, as `tokenizers` does for the rest of the run."""
        window = state.partial[:1]
        text = self._decode(window)
        broken = _State(window, text, given=len(text), settled=1, broken=True, shown=state.shown)
        return broken, _REPLACEMENT * len(state.partial)

    def _extend(self, state: _State, token_ids: tuple[int, ...]) -> tuple[_State, str]:
        """Append tokens to the window and return the text that they complete."""
        window = (*state.window, *token_ids)
        text, before = self._decode(window), state.text[: state.given]
        settled = state.settled
        if not text.startswith(before):
            # The new decoding contradicts text already emitted: keep that text and decode the tokens after it alone.
            window, before, settled = window[settled:], "", 0
            text = self._decode(window)
        held = 0 if self._vocabulary.bytes else _replaced_at_end(text)
        given = max(len(text) - held, len(before))
        settled = len(window) if given == len(text) else settled
        state = state._replace(window=window, text=text, given=given, settled=settled)
        return (self._shorten(state) if len(window) >= state.limit else state), text[len(before) : given]

    def _shorten(self, state: _State) -> _State:
        """Drop tokens from the start of the window that do not change the text after them."""
        window, rest = state.window, state.text[state.given :]
        tails = [window[self._boundary(window, len(window) - count) :] for count in _CONTEXTS]
        if not self._vocabulary.bytes:
            tails.append((*window[:_PROMPT], *window[-_PROMPT:]))  # for long runs of tokens without text
        for tail in tails:
            if len(tail) >= len(window):
                continue
            text = self._decode(tail)
            given = len(text) - len(rest)
            # Without context text, a token would be decoded as the first of a text (without its leading space).
            if text[max(given, 0) :] == rest and (given > 0 or not state.given):
                settled = max(0, state.settled - (len(window) - len(tail)))
                return state._replace(
                    window=tail, text=text, given=given, settled=settled, limit=max(_WINDOW, 2 * len(tail))
                )
        return state._replace(limit=2 * len(window))

    def _boundary(self, window: tuple[int, ...], start: int) -> int:
        """Return the last index at or before `start` that is not inside a character of several byte tokens."""
        while start > 0 and self._vocabulary.bytes.get(window[start], 0) & 0xC0 == 0x80:
            start -= 1
        return max(start, 0)

    def _decode(self, token_ids: Sequence[int]) -> str:
        try:
            if self._backend is not None:
                return self._backend.decode(list(token_ids), skip_special_tokens=False)
            return self._tokenizer.decode(list(token_ids), **self._options)
        except BaseException as error:
            if not is_library_error(error):
                raise
            raise CheckpointError(
                f"the tokenizer cannot decode the token ids {list(token_ids)} ({cause(error)}): its decoder is broken; "
                f"{REMEDY}."
            ) from error


def _replaced_at_end(text: str) -> int:
    """Count the replacement characters at the end of a text that may be an incomplete character."""
    end = text[1 - _LONGEST_CHARACTER :]
    return len(end) - len(end.rstrip(_REPLACEMENT))


def _pass_shown(state: _State, text: str) -> tuple[_State, str]:
    """Drop from the start of new text the replacement characters that already end the prompt's text."""
    if not text:
        return state, text
    shown = state.shown
    while text and shown and text[0] == shown[0]:
        text, shown = text[1:], shown[1:]
    return state._replace(shown="" if text else shown), text
