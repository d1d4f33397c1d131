"""Text from tokens as they come: split characters wait for their rest, and the pieces add up to the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from jaxinfer.text.stop import StopChecker, StopStrings

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class _FastStream:
    """`tokenizers.DecodeStream`."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=False)

    def step(self, token_ids: list[int]) -> str | None:
        """Take tokens; the text they complete, or None. Raises when it contradicts the text given before."""
        return self._stream.step(self._backend, token_ids)


class _SlowStream:
    """The same for a tokenizer without a Rust backend: the difference of two decodings of a short window."""

    def __init__(self, decode: Any) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._known = 0

    def step(self, token_ids: list[int]) -> str | None:
        """As `_FastStream.step`."""
        self._window += token_ids
        before = self._decode(self._window[: self._known])
        after = self._decode(self._window)
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return None
        if not after.startswith(before):
            raise ValueError("the decoding of a prefix is no prefix of the decoding")
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return after[len(before) :]


class Detokenizer:
    """The text of one sequence, token by token.

    The pieces add up to `tokenizer.decode(all_ids, skip_special_tokens=...,
    clean_up_tokenization_spaces=False)`, whatever the division into pushes. A character whose tokens are not
    all there is held back; when the sequence ends inside one, `finish` gives the replacement character, as
    `decode` does. Tokenizers whose decoding of a prefix is not a prefix of the decoding (none of the usual
    ones) keep what was given and go on from there.

    The cost is constant a token, amortised: while tokens give no text, tries are spaced by a quarter of those
    that wait.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True,
                 spaces_between_special_tokens: bool = True) -> None:
        """Decode with a transformers tokenizer; its Rust backend is used where it has one.

        Args:
            tokenizer: of transformers, fast or slow.
            skip_special_tokens: leave special tokens out.
            spaces_between_special_tokens: acted on by slow tokenizers only, as in transformers.
        """
        self._tokenizer = tokenizer
        self._options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        self._backend = getattr(tokenizer, "_tokenizer", None)
        if self._backend is None:
            self._options["spaces_between_special_tokens"] = spaces_between_special_tokens
        self._skipped = _special_ids(tokenizer, self._backend) if skip_special_tokens else frozenset()
        self._bytes = _byte_ids(self._backend)
        self._ids: list[int] = []
        self._pieces: list[str] = []
        self._waiting: list[int] = []
        self._tried = 0
        self._stream = self._new_stream()

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens, give the text they complete."""
        return "".join(self._push_one(int(token)) for token in token_ids)

    def finish(self) -> str:
        """The rest of the text, once no more tokens come."""
        if not self._waiting:
            return ""
        shown = "".join(self._pieces)
        whole = self._decode(self._ids)
        rest = whole[len(shown) :] if whole.startswith(shown) else self._decode(self._waiting)
        self._waiting = []
        return rest

    def _push_one(self, token: int) -> str:
        if token in self._skipped:
            return ""
        self._ids.append(token)
        self._waiting.append(token)
        # A run of byte tokens is decoded as one: one wrong byte more makes all of it replacement characters.
        if token in self._bytes or len(self._waiting) <= self._tried + self._tried // 4:
            return ""
        new = self._waiting[self._tried :]
        try:
            text = self._stream.step(new)
        except Exception:
            # The contradiction has no type of its own. What was shown stays; what waits is decoded anew.
            self._stream = self._new_stream()
            text = self._stream.step(self._waiting)
        self._tried = len(self._waiting)
        if text is None:
            return ""
        self._waiting, self._tried = [], 0
        self._pieces.append(text)
        return text

    def _new_stream(self) -> _FastStream | _SlowStream:
        return _SlowStream(self._decode) if self._backend is None else _FastStream(self._backend)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, **self._options)


class TextStream:
    """The text of one sequence up to its first stop string: a `Detokenizer` and a `StopChecker` in a row."""

    def __init__(self, detokenizer: Detokenizer, stop: StopStrings | None = None, *,
                 include_stop: bool = False, min_tokens: int = 0) -> None:
        """Check for `stop` (None: for nothing) in the text of `detokenizer`.

        Args:
            detokenizer: fresh, for this sequence alone.
            stop: shared by all samples of a request.
            include_stop: keep the matched string in the text.
            min_tokens: stop strings that end in the text of this many first tokens do not count.
        """
        self._detokenizer = detokenizer
        self._checker = None if stop is None else StopChecker(stop, include_stop=include_stop)
        self._min_tokens = min_tokens
        self._pieces: list[str] = []
        self.num_tokens = 0
        """Tokens taken, up to the one that completed the stop string."""

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text."""
        return None if self._checker is None else self._checker.matched

    @property
    def text(self) -> str:
        """All that was given so far."""
        return "".join(self._pieces)

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens, give the new text that can no longer become part of a stop string.

        Tokens after the one that completes a stop string are not taken: see `num_tokens`.
        """
        shown = []
        for token in token_ids:
            if self.matched is not None:
                break
            self.num_tokens += 1
            shown.append(self._check(self._detokenizer.push([token])))
        return self._give("".join(shown))

    def finish(self) -> str:
        """The rest of the text, once no more tokens come."""
        rest = self._check(self._detokenizer.finish())
        if self._checker is not None:
            rest += self._checker.finish()
        return self._give(rest)

    def _check(self, text: str) -> str:
        if self._checker is None:
            return text
        return self._checker.push(text, act=self.num_tokens > self._min_tokens)

    def _give(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text


def _special_ids(tokenizer: Any, backend: Any) -> frozenset[int]:
    """The ids that `skip_special_tokens` leaves out."""
    if backend is None:
        return frozenset(tokenizer.all_special_ids)
    return frozenset(token for token, added in backend.get_added_tokens_decoder().items() if added.special)


def _byte_ids(backend: Any) -> frozenset[int]:
    """The ids of the tokens <0x00> to <0xFF> that a byte-fallback decoder turns into bytes."""
    if backend is None or backend.decoder is None or b"ByteFallback" not in backend.decoder.__getstate__():
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token for token in ids if token is not None)
