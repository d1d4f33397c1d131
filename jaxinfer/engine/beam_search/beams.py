"""Beam search: choice of the beams that continue and of the finished ones.

It runs on the host, from the most likely continuations of each beam that a step has found, and makes the decisions of
transformers 5 (`GenerationMixin._beam_search`), in float32 as well. The search of a prompt does not depend on others.

    step n:  candidates [B, K] of B beams -> the K likeliest of all, best first
             those that end here, of the first W       -> finished, the best W are kept
             the first W of those that do not end here -> the beams of step n + 1

K is (1 + E) W for E stop tokens, so that W continue even if all stop tokens come first; at least 2 W.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxinfer.beam_params import BeamParams
from jaxinfer.engine.sampling.sampler import Candidates


@dataclass(frozen=True)
class Finished:
    """A finished beam."""

    tokens: np.ndarray
    """Output token ids, `[n]` int32, the stop token included."""
    logprob: float
    """Sum of the tokens' log-probabilities, after masks and penalties."""
    score: np.float32
    """`logprob` / n ** length_penalty."""
    stopped: bool
    """Whether a stop token ended it; otherwise the length limit did."""


class State(NamedTuple):
    """State of a search. Replaced as a whole, so that an interrupt finds either the old or the new state."""

    running: tuple[np.ndarray, ...]
    """Output token ids of the running beams, best first, `[n]` int32 each; empty if the search is over."""
    scores: np.ndarray
    """Sum of log-probabilities of each running beam, `[B]` float32."""
    finished: tuple[Finished, ...]
    """Finished beams, best first, at most W."""


class Beams:
    """The beam search of one prompt.

    Args:
        params: beam search parameters.
        limit: maximum number of output tokens of a beam.
        stop_ids: token ids that end a beam.
    """

    def __init__(self, params: BeamParams, limit: int, stop_ids: frozenset[int]):
        self.params, self.limit = params, limit
        self.count = max(2, 1 + len(stop_ids)) * params.width
        """K: number of candidates considered per step."""
        self.state = State((np.empty(0, np.int32),), np.zeros(1, np.float32), ())
        self._stop_ids = np.array(sorted(stop_ids), np.int32)

    @property
    def best(self) -> tuple[Finished, ...]:
        """The best finished beams so far, best first."""
        return self.state.finished[: self.params.num_return_sequences]

    def advance(self, offers: Sequence[Candidates]) -> list[tuple[int, int]]:
        """Advance the search by one step.

        Args:
            offers: the most likely continuations (at least K) of each beam, in the order of the last result.

        Returns:
            (index of the source beam, new token) of each beam that continues, best first; empty if the search is over.
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
        """Return beam, token and sum of log-probabilities of the K most likely continuations, best first.

        Ties are broken by the lower beam index, then the lower token id. Forbidden continuations are left out.
        """
        totals = np.concatenate([offer.scores + score for offer, score in zip(offers, self.state.scores, strict=True)])
        tokens = np.concatenate([offer.ids for offer in offers])
        beams = np.repeat(np.arange(len(offers)), [len(offer.ids) for offer in offers])
        order = np.lexsort((tokens, beams, -totals))[: self.count]
        order = order[np.isfinite(totals[order])]
        return beams[order], tokens[order], totals[order]

    def _over(self, scores: np.ndarray, finished: Sequence[Finished], length: int) -> bool:
        """Return whether no beam can continue, or the running beams are not expected to reach the best W."""
        params = self.params
        if not len(scores):
            return True
        if len(finished) < params.width:
            return False
        reach = self.limit if params.early_stopping == "never" and params.length_penalty > 0 else length
        best = scores[0] / np.float32(reach**params.length_penalty)
        return params.early_stopping is True or bool(best <= finished[-1].score)
