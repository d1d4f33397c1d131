"""Tables of log-probabilities whose tokens read as the text does."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxinfer.outputs import Logprob
from jaxinfer.results.detokenizer import Detokenizer


class Likely(NamedTuple):
    """The log-probabilities of one position, as the engine reads them from the device."""

    chosen: float | np.floating
    """Of the token that is there."""
    rank: int | np.integer
    ids: np.ndarray
    """The likeliest tokens."""
    top: np.ndarray
    """Their log-probabilities."""


class LogprobTable:
    """Makes the candidates of one position after the other, each with the text that it adds to the text before it."""

    def __init__(self, detokenizer: Detokenizer | None, count: int) -> None:
        """Show `count` candidates a position; without a detokenizer they have no text.

        Args:
            detokenizer: of this table alone, at the end of the text before the first position.
            count: how many of the likeliest tokens to show beside the one that is there.
        """
        self._detokenizer, self._count = detokenizer, count

    def skip(self, token: int) -> None:
        """Pass over a token of the text that has no log-probability: the first of a prompt."""
        if self._detokenizer is not None:
            self._detokenizer.push([token])

    def row(self, token: int, likely: Likely, *, last: bool = False, in_text: bool = True) -> dict[int, Logprob]:
        """Return the candidates of the next position by their ids, the token that is there first.

        Args:
            token: the token that is there.
            likely: its log-probability and those of the likeliest tokens.
            last: whether the text ends with it, so that an unfinished character is shown.
            in_text: whether the token is part of the text; one that ends an output may not be.
        """
        others = likely.ids[: self._count].tolist()
        words = {other: self._candidate(other) for other in others if other != token}
        rows = {token: Logprob(float(likely.chosen), int(likely.rank), self._take(token, last=last, in_text=in_text))}
        for place, (other, value) in enumerate(zip(others, likely.top[: self._count].tolist(), strict=True)):
            if other != token:
                rows.setdefault(other, Logprob(value, place + 1, words[other]))
        return rows

    def _candidate(self, token: int) -> str | None:
        """The text that another token would have added. Special tokens are shown even if the text leaves them out."""
        made = self._detokenizer
        if made is None:
            return None
        return made.special_text(token) if made.skips(token) else made.peek(token)

    def _take(self, token: int, *, last: bool, in_text: bool) -> str | None:
        made = self._detokenizer
        if made is None:
            return None
        return (made.push([token]) if in_text else "") + (made.finish() if last else "")
