"""Text from tokens as they come: each character is given when its last token is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.checkpoint.tokenizer_errors import REMEDY, cause, is_library_error
from jaxinfer.errors import CheckpointError
from jaxinfer.results.vocabulary import backend_of, knows_spaces, vocabulary

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8: of an unfinished one at most three are there."""
_WINDOW = 4
"""Tokens that are decoded together before the first of them are dropped."""
_CONTEXTS = (1, 4, 8)
"""Tokens of the text before that new ones are decoded with: the fewest that have text and hold what is not given
yet."""
_PROMPT = 4
"""Tokens of the prompt that its output is decoded with; more, if they have no text."""


class _State(NamedTuple):
    """The progress of one text. It is never changed, so that a token can be tried and dropped again."""

    window: tuple[int, ...] = ()
    """The last tokens of the text: some whose text was given as context, and all whose text was not."""
    text: str = ""
    """The window, decoded."""
    given: int = 0
    """Characters of `text` that were given out."""
    settled: int = 0
    """Tokens of the window whose text was given out whole."""
    limit: int = _WINDOW
    """Tokens at which the window is shortened."""
    partial: tuple[int, ...] = ()
    """The byte tokens of an unfinished character."""
    broken: bool = False
    """Whether the run of byte tokens at the end of the text is not UTF-8."""
    shown: str = ""
    """Replacement characters at the end of the prompt's text that the output may still resolve."""


class Detokenizer:
    """Decodes one sequence token by token.

    The pieces add up to what `tokenizer.decode(prompt + output, skip_special_tokens=...,
    clean_up_tokenization_spaces=False)` adds to the text of `prompt`, whatever the division into pushes. A character
    is given with its last token. When the sequence ends inside a character, `finish` gives the replacement characters
    that `decode` does.

    The pieces differ from `decode` in one case: a decoder with byte fallback (Llama 2, Gemma) replaces every byte of a
    run of byte tokens if one of them is wrong. The characters of the run that were given before the wrong byte stay.
    Tokenizers whose decoding of a prefix is not a prefix of the decoding keep what was given as well.

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
            tokenizer: a tokenizer of transformers; its Rust backend is used where it has one.
            prompt: token ids that the text continues. Its last tokens decide, for instance, whether the first word
                keeps its leading space.
            skip_special_tokens: leave special tokens out of the text.
            spaces_between_special_tokens: acted on only by tokenizers without a Rust backend that know it.
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
        """Take the next tokens and return the text that they complete."""
        pieces = []
        for token in token_ids:
            self._state, piece = self._step(self._state, int(token))
            pieces.append(piece)
        return "".join(pieces)

    def peek(self, token: int) -> str:
        """Return the text that `push([token])` would return, without taking the token."""
        state, pieces = self._state, self._vocabulary.pieces
        complete = 0 < state.given == len(state.text) and not state.partial and not state.shown
        if pieces is None or not complete or token in self._vocabulary.bytes or self.skips(token):
            return self._step(state, token)[1]
        if token not in pieces:
            pieces[token] = self._step(state, token)[1]
        return pieces[token]

    def finish(self) -> str:
        """Return the rest of the text, once no more tokens come."""
        state = self._state
        rest = state.text[state.given :] + _REPLACEMENT * len(state.partial)
        self._state, rest = _pass_shown(state._replace(given=len(state.text), partial=()), rest)
        return rest

    def skips(self, token: int) -> bool:
        """Whether a token is a special one that is left out of the text."""
        return self._skips and token in self._vocabulary.special

    def special_text(self, token: int) -> str | None:
        """Return the text of a special token, whether or not special tokens are left out; None for other tokens."""
        if token not in self._vocabulary.special:
            return None
        return self._backend.id_to_token(token) if self._backend else self._tokenizer.convert_ids_to_tokens(token)

    def _read(self, prompt: Sequence[int] | np.ndarray) -> None:
        """Take the last tokens of the prompt, from the beginning of a run of byte tokens if it ends in one."""
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
        """Whether a token gives no text: a special token that is skipped, or an id that the tokenizer does not have."""
        return self.skips(token) or (self._backend is not None and self._backend.id_to_token(token) is None)

    def _step(self, state: _State, token: int) -> tuple[_State, str]:
        """The state after one more token, and the text that it completes."""
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
        """Take a byte token. `tokenizers` decodes a run of them as one, so only whole characters are decoded."""
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
        """Replace each byte of a character that cannot be finished, as `tokenizers` does for the rest of the run."""
        window = state.partial[:1]
        text = self._decode(window)
        broken = _State(window, text, given=len(text), settled=1, broken=True, shown=state.shown)
        return broken, _REPLACEMENT * len(state.partial)

    def _extend(self, state: _State, token_ids: tuple[int, ...]) -> tuple[_State, str]:
        """Decode tokens together with those before them."""
        window = (*state.window, *token_ids)
        text, before = self._decode(window), state.text[: state.given]
        settled = state.settled
        if not text.startswith(before):
            # The tokenizer contradicts the text that was given. It stays, and the tokens after it are decoded anew.
            window, before, settled = window[settled:], "", 0
            text = self._decode(window)
        held = 0 if self._vocabulary.bytes else _replaced_at_end(text)
        given = max(len(text) - held, len(before))
        settled = len(window) if given == len(text) else settled
        state = state._replace(window=window, text=text, given=given, settled=settled)
        return (self._shorten(state) if len(window) >= state.limit else state), text[len(before) : given]

    def _shorten(self, state: _State) -> _State:
        """Drop tokens from the window where the text that follows does not need them."""
        window, rest = state.window, state.text[state.given :]
        tails = [window[self._boundary(window, len(window) - count) :] for count in _CONTEXTS]
        if not self._vocabulary.bytes:
            tails.append((*window[:_PROMPT], *window[-_PROMPT:]))  # for many tokens in a row that have no text
        for tail in tails:
            if len(tail) >= len(window):
                continue
            text = self._decode(tail)
            given = len(text) - len(rest)
            # Without any text before it, a token would be decoded as the first of the text.
            if text[max(given, 0) :] == rest and (given > 0 or not state.given):
                settled = max(0, state.settled - (len(window) - len(tail)))
                return state._replace(
                    window=tail, text=text, given=given, settled=settled, limit=max(_WINDOW, 2 * len(tail))
                )
        return state._replace(limit=2 * len(window))

    def _boundary(self, window: tuple[int, ...], start: int) -> int:
        """The last place, at or before `start`, that is not inside a character of several byte tokens."""
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
    """Replacement characters at the end of the text that may be an unfinished character."""
    end = text[1 - _LONGEST_CHARACTER :]
    return len(end) - len(end.rstrip(_REPLACEMENT))


def _pass_shown(state: _State, text: str) -> tuple[_State, str]:
    """Drop from new text the replacement characters that the prompt's text ends in."""
    if not text:
        return state, text
    shown = state.shown
    while text and shown and text[0] == shown[0]:
        text, shown = text[1:], shown[1:]
    return state._replace(shown="" if text else shown), text
