"""Beam search: which continuations of a prompt's beams go on, and which are its results.

Decided on the host, from the likeliest continuations of each beam that a step has found; the same decisions as those of
transformers 5 (`GenerationMixin._beam_search`), in float32 like there. A prompt's search does not depend on others.

    step n:  candidates [B, K] of B beams -> the K likeliest of all, best first
             those that end here, of the first W       -> finished, the best W are kept
             the first W of those that do not end here -> the beams of step n + 1

K is (1 + E) W for E tokens that end a beam, so that W are left even if all of those come first; at least 2 W.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxinfer.beam_params import BeamParams
from jaxinfer.engine.sampling.sampler import Candidates


@dataclass(frozen=True)
class Finished:
    """A beam that has come to its end."""

    tokens: np.ndarray
    """`[n]` int32, what ended it included."""
    logprob: float
    """The sum of its tokens' log-probabilities, after all that masks and penalties change."""
    score: np.float32
    """The same over n to the power of the length penalty."""
    stopped: bool
    """Whether its last token ended it; otherwise it came to the greatest length."""


class State(NamedTuple):
    """How far a search is; replaced as a whole, so that an interrupt finds the one before or the one after."""

    running: tuple[np.ndarray, ...]
    """The tokens of the beams that go on, best first, `[n]` int32 each; none where it is over."""
    scores: np.ndarray
    """`[B]` float32 their sums of log-probabilities."""
    finished: tuple[Finished, ...]
    """Best first, at most W."""


class Beams:
    """The search of one prompt.

    Args:
        params: how it is run.
        limit: tokens that a beam may have, without the prompt.
        stop_ids: tokens that end a beam.
    """

    def __init__(self, params: BeamParams, limit: int, stop_ids: frozenset[int]):
        self.params, self.limit = params, limit
        self.count = max(2, 1 + len(stop_ids)) * params.width
        """K: candidates that are looked at in a step."""
        self.state = State((np.empty(0, np.int32),), np.zeros(1, np.float32), ())
        self._stop_ids = np.array(sorted(stop_ids), np.int32)

    @property
    def best(self) -> tuple[Finished, ...]:
        """The results there are, best first."""
        return self.state.finished[: self.params.num_return_sequences]

    def advance(self, offers: Sequence[Candidates]) -> list[tuple[int, int]]:
        """Takes a step.

        Args:
            offers: of each beam, in the order of the last result, its likeliest continuations: K of them or more.

        Returns:
            The beams that go on, best first: the number of the one each comes from, and its new token. None: it is
                over.
        """
        made, width = self.state.running, self.params.width
        length = len(made[0]) + 1
        beams, tokens, totals = self._likeliest(offers)
        stops = np.isin(tokens, self._stop_ids)
        ends = stops | (length >= self.limit)
        scores = totals / np.float32(length**self.params.length_penalty)
        longer = [np.append(made[beam], token).astype(np.int32) for beam, token in zip(beams, tokens, strict=True)]
        ended = np.flatnonzero(ends[:width]).tolist()
        new = [Finished(longer[i], float(totals[i]), scores[i], bool(stops[i])) for i in ended]
        finished = tuple(sorted([*self.state.finished, *new], key=lambda beam: -beam.score)[:width])
        going = np.flatnonzero(~ends)[:width]
        if self._over(totals[going], finished, length):
            going = going[:0]
        self.state = State(tuple(longer[i] for i in going), totals[going], finished)
        return list(zip(beams[going].tolist(), tokens[going].tolist(), strict=True))

    def _likeliest(self, offers: Sequence[Candidates]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Beam, token and sum of log-probabilities of the K likeliest continuations, best first.

        Of equal ones the first beam's, then the smaller token. Forbidden ones are left out.
        """
        totals = np.concatenate([offer.scores + score for offer, score in zip(offers, self.state.scores, strict=True)])
        tokens = np.concatenate([offer.ids for offer in offers])
        beams = np.repeat(np.arange(len(offers)), [len(offer.ids) for offer in offers])
        order = np.lexsort((tokens, beams, -totals))[: self.count]
        order = order[np.isfinite(totals[order])]
        return beams[order], tokens[order], totals[order]

    def _over(self, scores: np.ndarray, finished: Sequence[Finished], length: int) -> bool:
        """Whether no beam can go on, or none that does is expected to be among the best."""
        params = self.params
        if not len(scores):
            return True
        if len(finished) < params.width:
            return False
        reach = self.limit if params.early_stopping == "never" and params.length_penalty > 0 else length
        best = scores[0] / np.float32(reach**params.length_penalty)
        return params.early_stopping is True or bool(best <= finished[-1].score)
