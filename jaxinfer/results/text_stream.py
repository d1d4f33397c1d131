"""Decode the tokens of a sequence and cut the text at the first stop string."""

from __future__ import annotations

from collections.abc import Iterable

from jaxinfer.results.detokenizer import Detokenizer
from jaxinfer.results.stop_strings import StopChecker, StopStrings


class TextStream:
    """Text of one sequence up to its first stop string: a `Detokenizer` followed by a `StopChecker`."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: StopStrings | None = None,
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """Start a text.

        Args:
            detokenizer: detokenizer used by this sequence only, at the end of its prompt.
            stop: stop strings, shared by all samples of a request; None for none.
            include_stop: whether to keep the matched stop string in the text.
            min_tokens: stop strings that end within the first `min_tokens` tokens are ignored.
        """
        self._detokenizer = detokenizer
        self._checker = None if stop is None else StopChecker(stop, include_stop=include_stop)
        self._min_tokens = min_tokens
        self._pieces: list[str] = []
        self.num_tokens = 0
        """Number of tokens processed, up to the one that completed the stop string."""

    @property
    def matched(self) -> str | None:
        """Stop string that ended the text; None if none did."""
        return None if self._checker is None else self._checker.matched

    @property
    def text(self) -> str:
        """Whole text returned so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def push(self, token_ids: Iterable[int]) -> str:
        """Append tokens and return the new text that can no longer become part of a stop string.

        Tokens after the one that completes a stop string are ignored: see `num_tokens`.
        """
        shown = []
        for token in token_ids:
            if self.matched is not None:
                break
            self.num_tokens += 1
            text = self._detokenizer.push([token])
            shown.append(self._check_left_out(token) if self._detokenizer.skips(token) else self._check(text))
        return self._give("".join(shown))

    def end(self, token: int) -> str:
        """Append a token that ends the sequence and is hidden from its text; it can still complete a stop string."""
        if self.matched is not None:
            return ""
        self.num_tokens += 1
        return self._give(self._check_left_out(token))

    def finish(self) -> str:
        """Return the rest of the text at the end of the sequence."""
        rest = self._check(self._detokenizer.finish())
        if self._checker is not None:
            rest += self._checker.finish()
        return self._give(rest)

    def _check(self, text: str, *, hidden: bool = False) -> str:
        if self._checker is None:
            return "" if hidden else text
        return self._checker.push(text, act=self.num_tokens > self._min_tokens, hidden=hidden)

    def _check_left_out(self, token: int) -> str:
        """Match stop strings against the text of a skipped special token."""
        return self._check(self._detokenizer.special_text(token) or "", hidden=True)

    def _give(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text
