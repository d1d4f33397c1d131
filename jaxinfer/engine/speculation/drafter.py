"""Choose drafts for the sequences of a decode step, and stop where they do not pay."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxinfer.engine.request import Sequence as Sample
from jaxinfer.engine.sampling.parameters import forbids_for_a_while, sampler_level
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.engine.speculation.prompt_lookup import find_draft
from jaxinfer.speculative_config import SpeculativeConfig

LONGEST_WAIT = 64
"""Most tokens that a sequence makes without a draft after its drafts were wrong."""
LONGEST_SEARCH = 8
"""Most tokens that a sequence makes between two look-ups that find nothing."""
PAUSE = 64
"""Decode steps without drafts after steps with drafts made fewer tokens a second than decode steps; twice as many each
time that the steps after a pause do so again, up to `LONGEST_PAUSE`."""
LONGEST_PAUSE = 1024
TRIAL = 4
"""Decode steps without drafts after the first `WINDOW` steps with drafts if none was measured before; of several, as
one may wait for its program to compile."""
WINDOW = 8
"""Number of steps with drafts after which their speed is judged; the slowest, which may have compiled, is left out."""


class Payoff:
    """Compares the speed of steps that verify drafts with that of decode steps."""

    def __init__(self) -> None:
        self.pause = 0
        """Number of decode steps for which nothing is drafted."""
        self._decode: float | None = None
        """Seconds of a decode step; None if none was measured."""
        self._verified: list[tuple[float, float]] = []
        """Seconds of the last steps with drafts, and the tokens that each made of a sequence."""
        self._next = PAUSE
        self._spent = 0.0
        """Seconds of drafting for these steps."""

    def note_decode(self, seconds: float) -> None:
        """Record a decode step. A time above the estimate counts half, as one slow step is no measure of the others."""
        known = self._decode
        self._decode = seconds if known is None or seconds < known else (known + seconds) / 2
        self.pause = max(0, self.pause - 1)

    def note_verify(self, seconds: float, made: float, spent: float = 0.0) -> None:
        """Record a step that verified drafts and made `made` tokens of each sequence.

        `spent`: seconds of drafting before it. They count for every step, as the one before which the draft model
        reads a prompt is the slowest in any case.
        """
        self._spent += spent
        self._verified.append((seconds, made))
        if len(self._verified) < WINDOW:
            return
        kept, self._verified = sorted(self._verified)[:-1], []
        spent, self._spent = self._spent + sum(s for s, _ in kept), 0.0
        if self._decode is None:
            self.pause = TRIAL
        elif spent > self._decode * sum(made for _, made in kept):
            self.pause, self._next = self._next, min(2 * self._next, LONGEST_PAUSE)
        else:
            self._next = PAUSE


class Drafter:
    """Drafts tokens for decoding sequences.

    A draft after one that was right has up to twice its tokens, another one more than were right before. A sequence
    whose draft was wrong from its first token on makes 1, 2, 4, ... tokens before the next one; one whose last tokens
    occur nowhere before does so, too, up to `LONGEST_SEARCH`: while a draft is due, a step waits for the tokens of the
    one before. Sequences with penalties or biases get no draft: their samples depend on all tokens before. In a step
    with a beam search or a grammar nothing is drafted.
    """

    def __init__(
        self,
        config: SpeculativeConfig,
        most: int,
        lacks: Callable[[Sequence[Sample], np.ndarray, int], bool],
    ):
        """Make a drafter.

        Args:
            config: how to draft.
            most: maximum number of tokens that a step verifies, each sequence's last one included.
            lacks: returns whether the program is missing that verifies drafts of these sequences, rows and tokens; it
                is then compiled meanwhile.
        """
        self._config, self._most, self._lacks = config, most, lacks
        self.payoff = Payoff()
        self._made: list[int] = []
        """Tokens made of each sequence by the step that is being committed."""
        self._spent = 0.0
        """Seconds that drafting has taken since the last step with drafts."""
        self._reads_prompts = False
        """Whether the device computes something else before the next decode step."""

    def may_draft(self, sequences: Sequence[Sample]) -> bool:
        """Return whether some of the running sequences may get a draft, so that their tokens must be read first."""
        if self.payoff.pause or len(sequences) >= self._most:
            return False
        return any(map(self._is_due, sequences)) and not any(map(_excludes, sequences))

    def propose(self, sequences: Sequence[Sample], rows: np.ndarray, remaining: np.ndarray) -> list[np.ndarray] | None:
        """Return a draft for each sequence of a decode step, possibly empty; None if all are.

        Args:
            sequences, rows: the sequences of the step, and their rows `[B]`.
            remaining: number of tokens that each may still make, `[B]`.
        """
        if not self.may_draft(sequences) or any(s.pending for s in sequences):
            return None
        room, drafts = self._most - len(sequences), []
        for sequence, left in zip(sequences, remaining.tolist(), strict=True):
            most = min(self._config.num_speculative_tokens, sequence.draft_size)
            count = min(most, left - 1, room) if self._is_due(sequence) else 0
            drafts.append(self._find(sequence, count))
            room -= len(drafts[-1])
        tokens = len(sequences) + sum(map(len, drafts))
        if tokens <= len(sequences) or self._lacks(sequences, rows, tokens):
            return None
        return drafts

    def _find(self, sequence: Sample, count: int) -> np.ndarray:
        if count < 1:
            return np.empty(0, np.int32)
        config, known = self._config, sequence.tokens[: sequence.length]
        found = find_draft(known, count, config.prompt_lookup_max, config.prompt_lookup_min)
        sequence.empty_lookups = 0 if len(found) else sequence.empty_lookups + 1
        if not len(found):
            sequence.draft_from = sequence.length + min(2 ** (sequence.empty_lookups - 1), LONGEST_SEARCH)
        return found

    def _is_due(self, sequence: Sample) -> bool:
        request = sequence.request
        free = sampler_level(request) < Level.EDITED and not forbids_for_a_while(request)
        return free and sequence.length >= sequence.draft_from

    def leave(self, sequence: Sample) -> None:
        """Forget a running sequence that is about to lose its row."""

    def forget(self) -> None:
        """Forget what is cached of all sequences."""

    def note(self, sequence: Sample, drafted: int, accepted: int) -> None:
        """Record how many of a draft's tokens were right; the sequence has none of the step's tokens yet."""
        self._made.append(accepted + 1)
        if not drafted:
            return
        sequence.draft_size = 2 * drafted if accepted == drafted else accepted + 1
        sequence.wrong_drafts = 0 if accepted else sequence.wrong_drafts + 1
        if not accepted:
            wait = min(2 ** (sequence.wrong_drafts - 1), LONGEST_WAIT)
            sequence.draft_from = sequence.length + 1 + wait

    def note_step(self, seconds: float | None) -> None:
        """Record the seconds of a decode step, or of the step whose drafts were noted before.

        None for a step with a prefill, whose time is no measure of either.
        """
        made, self._made = self._made, []
        if made:
            spent, self._spent = self._spent, 0.0
        delayed, self._reads_prompts = self._reads_prompts, False
        if seconds is None:
            return
        if made:
            self.payoff.note_verify(seconds, sum(made) / len(made), spent)
        elif not delayed:
            self.payoff.note_decode(seconds)


def _excludes(sequence: Sample) -> bool:
    """Return whether nothing can be drafted in a step of this sequence."""
    return sequence.request.grammar is not None or sequence.request.beams is not None
