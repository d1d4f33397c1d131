"""Per-row sampling parameters, cached as arrays so that a step does not iterate over sequences."""

from collections.abc import Iterable
from collections.abc import Sequence as Items

import numpy as np

from jaxinfer.engine.request import Sequence
from jaxinfer.engine.runner.buckets import Needs
from jaxinfer.engine.sampling.parameters import forbidden, forbids_for_a_while, sampler_level, sampling_row
from jaxinfer.engine.sampling.sampling_rows import EDITED, WIDTH, Level


class RowParams:
    """Sampling parameters by row, written when a row's sequence starts to sample."""

    def __init__(self, rows: int):
        self.packed = np.zeros((rows, WIDTH), np.int32)
        """Parameters, `[R, WIDTH]`, as packed by `sampling_rows.pack_rows`."""
        self.levels = np.zeros(rows, np.int8)
        """Sampler level of each row's next step, `[R]`."""
        self.varying = np.zeros(rows, bool)
        """Whether each row's level changes as tokens are sampled, `[R]`: `update_levels` must then be called for each
        step.
        """
        self.structured = np.zeros(rows, bool)
        """Whether each row has a grammar, `[R]`."""
        self._logprobs = np.full(rows, -1, np.int8)
        self._candidates = np.zeros(rows, np.int32)

    def write(self, samples: Iterable[Sequence]) -> None:
        """Write the parameters of these sequences' rows."""
        for sequence in samples:
            row, request, count = sequence.row, sequence.request, sequence.request.params.logprobs
            self.packed[row] = sampling_row(sequence)
            self.levels[row], self._logprobs[row] = sampler_level(request), -1 if count is None else count
            self.varying[row] = forbids_for_a_while(request)
            self.structured[row] = request.grammar is not None
            self._candidates[row] = 0 if request.beams is None else request.beams.count

    def update_levels(self, samples: Items[Sequence], positions: np.ndarray) -> None:
        """Set the level of rows with temporarily forbidden tokens: EDITED if some are forbidden at `positions`."""
        rows = np.array([sequence.row for sequence in samples], np.int32)
        for i in np.flatnonzero(self.varying[rows]).tolist():
            sequence, row = samples[i], rows[i]
            level = Level.EDITED if forbidden(sequence, int(positions[i])) else sampler_level(sequence.request)
            self.levels[row], self.packed[row, EDITED] = level, level >= Level.EDITED

    def needs(self, rows: np.ndarray) -> Needs:
        """Return the least features that serve all these rows."""
        return Needs(
            Level(int(self.levels[rows].max(initial=Level.GREEDY))),
            int(self._logprobs[rows].max(initial=-1)),
            candidates=int(self._candidates[rows].max(initial=0)),
        )
