"""The text of one sequence: tokens are decoded, and the text is cut at the first stop string."""

from __future__ import annotations

from collections.abc import Iterable

from jaxinfer.results.detokenizer import Detokenizer
from jaxinfer.results.stop_strings import StopChecker, StopStrings


class TextStream:
    """The text of one sequence up to its first stop string: a `Detokenizer` and a `StopChecker` in a row."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: StopStrings | None = None,
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """Check for `stop` (None: for nothing) in the text of `detokenizer`.

        Args:
            detokenizer: of this sequence alone, at the end of its prompt.
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
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens and return the new text that can no longer become part of a stop string.

        Tokens after the one that completes a stop string are not taken: see `num_tokens`.
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
        """Take a token that ends the sequence and is no part of its text; a stop string may end in it all the same."""
        if self.matched is not None:
            return ""
        self.num_tokens += 1
        return self._give(self._check_left_out(token))

    def finish(self) -> str:
        """Return the rest of the text, once no more tokens come."""
        rest = self._check(self._detokenizer.finish())
        if self._checker is not None:
            rest += self._checker.finish()
        return self._give(rest)

    def _check(self, text: str, *, hidden: bool = False) -> str:
        if self._checker is None:
            return "" if hidden else text
        return self._checker.push(text, act=self.num_tokens > self._min_tokens, hidden=hidden)

    def _check_left_out(self, token: int) -> str:
        """Look for stop strings that a special token completes."""
        return self._check(self._detokenizer.special_text(token) or "", hidden=True)

    def _give(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text
