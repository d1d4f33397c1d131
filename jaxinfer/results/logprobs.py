"""Tables of log-probabilities with the decoded text of each candidate token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxinfer.outputs import Logprob
from jaxinfer.results.detokenizer import Detokenizer


class Likely(NamedTuple):
    """Log-probabilities of one position, as the engine reads them from the device."""

    chosen: float | np.floating
    """Log-probability of the sequence's token at this position."""
    rank: int | np.integer
    """Rank of that token among all tokens."""
    ids: np.ndarray
    """Ids of the most likely tokens, in descending order of likelihood."""
    top: np.ndarray
    """Log-probabilities of `ids`."""


class LogprobTable:
    """Builder of a sequence's log-probability table: per position, candidate tokens and the text that each adds."""

    def __init__(self, detokenizer: Detokenizer | None, count: int) -> None:
        """Start a table.

        Args:
            detokenizer: detokenizer used by this table only, at the end of the text before the first position; None
                for candidates without text.
            count: number of most likely tokens to list besides the sequence's token.
        """
        self._detokenizer, self._count = detokenizer, count

    def skip(self, token: int) -> None:
        """Skip a token without log-probability, the first of a prompt."""
        if self._detokenizer is not None:
            self._detokenizer.push([token])

    def row(self, token: int, likely: Likely, *, last: bool = False, in_text: bool = True) -> dict[int, Logprob]:
        """Return the candidates of the next position: token id -> log-probability, the sequence's token first.

        Args:
            token: the sequence's token at this position.
            likely: log-probabilities of `token` and of the most likely tokens.
            last: whether the text ends with this token, so that an incomplete character is emitted.
            in_text: whether the token is part of the text; a token that ends an output may not be.
        """
        others = likely.ids[: self._count].tolist()
        words = {other: self._candidate(other) for other in others if other != token}
        rows = {token: Logprob(float(likely.chosen), int(likely.rank), self._take(token, last=last, in_text=in_text))}
        for place, (other, value) in enumerate(zip(others, likely.top[: self._count].tolist(), strict=True)):
            if other != token:
                rows.setdefault(other, Logprob(value, place + 1, words[other]))
        return rows

    def _candidate(self, token: int) -> str | None:
        """Return the text that another token would have added; skipped special tokens have text here, too."""
        made = self._detokenizer
        if made is None:
            return None
        return made.special_text(token) if made.skips(token) else made.peek(token)

    def _take(self, token: int, *, last: bool, in_text: bool) -> str | None:
        made = self._detokenizer
        if made is None:
            return None
        return (made.push([token]) if in_text else "") + (made.finish() if last else "")
