"""Rows of the batch: the sequence of each row, and how many tokens it may still sample."""

import numpy as np

from jaxinfer.engine.request import Sequence
from jaxinfer.engine.sampling.parameters import depends_on_history
from jaxinfer.engine.sequence_state import Status


class Rows:
    """The rows that running sequences have; arrays `[R]` so that a decode step costs no loop over sequences."""

    def __init__(self, count: int):
        self.running: list[Sequence | None] = [None] * count
        """Sequence of each row; None for a free row."""
        self.free = list(range(count - 1, -1, -1))
        """Free rows; the last one is taken next."""
        self.prefilling: list[Sequence] = []
        """Running sequences whose prompt is not computed yet."""
        self.decoding = np.zeros(count, bool)
        """Whether the prompt of each row is computed."""
        self.held = np.zeros(count, bool)
        """Rows that stay out of decode steps while the program that they need is compiled."""
        self.stepped = np.zeros(count, bool)
        """Whether each row's sequence has taken part in a decode step since it got the row."""
        self.remaining = np.zeros(count, np.int64)
        """Number of tokens each row may still sample, not counting those in flight."""
        self.masked = np.zeros(count, np.int64)
        """Number of tokens until the row's bias changes (`min_tokens`); 0 or less if it no longer does."""
        self._num_history_dependent = 0
        self._num_structured = 0

    @property
    def active(self) -> list[Sequence]:
        """Running sequences."""
        return [s for s in self.running if s is not None]

    @property
    def num_used(self) -> int:
        """Number of running sequences."""
        return len(self.running) - len(self.free)

    @property
    def needs_history(self) -> bool:
        """Whether some running sequence's next step depends on tokens the host must have read."""
        return self._num_history_dependent > 0

    @property
    def needs_masks(self) -> bool:
        """Whether some running sequence has a grammar: the mask of each step depends on the token before."""
        return self._num_structured > 0

    def take(self, sequence: Sequence) -> None:
        """Give a waiting sequence the next free row, whose prompt is to be computed."""
        row = sequence.row = self.free.pop()
        sequence.status, sequence.bias_version, sequence.needed_blocks = Status.RUNNING, -1, 0
        sequence.last_hit = sequence.checked_inflight = None
        sequence.prepare()
        request = sequence.request
        self.running[row] = sequence
        self.held[row] = self.stepped[row] = False
        self.prefilling.append(sequence)
        # A beam samples one token; the search then chooses among the continuations of all beams.
        self.remaining[row] = sequence.stage_limit - sequence.length if request.beams is None else 1
        self.masked[row] = request.params.min_tokens - sequence.made if request.stop_ids else 0
        self._num_history_dependent += depends_on_history(request)
        self._num_structured += request.grammar is not None

    def start_decoding(self, sequence: Sequence) -> None:
        """Mark the prompt of a sequence as computed by the steps planned so far."""
        self.prefilling.remove(sequence)
        self.decoding[sequence.row] = True

    def release(self, sequence: Sequence) -> None:
        """Free the row of a running sequence."""
        row = sequence.row
        if not self.decoding[row]:
            self.prefilling.remove(sequence)
        self._num_history_dependent -= depends_on_history(sequence.request)
        self._num_structured -= sequence.request.grammar is not None
        self.running[row], self.decoding[row], self.remaining[row] = None, False, 0
        self.free.append(row)
        sequence.row = -1

    def decodable(self, most: int) -> np.ndarray:
        """Return the rows of the next decode step, at most `most`, `[B]`."""
        return np.flatnonzero(self.decoding & (self.remaining > 0) & ~self.held)[:most]

    def steps_until_a_change(self, rows: np.ndarray, most: int) -> int:
        """Return the number of decode steps, at most `most`, until a row reaches its limit or changes its bias.

        It is 1 if a step depends on tokens that the host must have read.
        """
        if self.needs_history or self.needs_masks:
            return 1
        masked = self.masked[rows]
        return min(most, int(self.remaining[rows].min()), int(masked[masked > 0].min(initial=most)))

    def sequences(self, rows: np.ndarray) -> list[Sequence]:
        """Return the sequences of rows `[B]` in use."""
        running = self.running
        return [running[row] for row in rows.tolist()]

    def advance(self, rows: np.ndarray, tokens: int | np.ndarray) -> list[Sequence]:
        """Count the next tokens of rows `[B]`, as many of each or `[B]`, as planned; return the rows' sequences."""
        self.remaining[rows] -= tokens
        self.masked[rows] -= tokens
        self.stepped[rows] = True
        sequences = self.sequences(rows)
        if isinstance(tokens, int):
            for sequence in sequences:
                sequence.pending += tokens
        else:
            for sequence, own in zip(sequences, tokens.tolist(), strict=True):
                sequence.pending += own
        return sequences

    def take_back(self, sequence: Sequence, tokens: int) -> None:
        """Undo `advance` for the last tokens of a running sequence."""
        self.remaining[sequence.row] += tokens
        self.masked[sequence.row] += tokens
