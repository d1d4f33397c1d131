"""What the running sequences ask of the sampler, by rows: a step reads it without a look at any of them."""

from collections.abc import Iterable

import numpy as np

from jaxinfer.engine.buckets import Needs
from jaxinfer.engine.request import Sequence, settings
from jaxinfer.engine.sampling_rows import WIDTH, Level


class Asked:
    """One entry a row, written when its sequence starts to sample."""

    def __init__(self, rows: int):
        self.settings = np.zeros((rows, WIDTH), np.int32)
        """`[R, WIDTH]` as `sampler.pack_rows` has them."""
        self._levels = np.zeros(rows, np.int8)
        self._logprobs = np.full(rows, -1, np.int8)
        self._candidates = np.zeros(rows, np.int32)

    def write(self, samples: Iterable[Sequence]) -> None:
        """Takes over the rows of these sequences."""
        for sequence in samples:
            row, request = sequence.row, sequence.request
            self.settings[row] = settings(sequence)
            count = request.params.logprobs
            self._levels[row], self._logprobs[row] = request.level, -1 if count is None else count
            self._candidates[row] = 0 if request.beams is None else request.beams.count

    def needs(self, rows: np.ndarray) -> Needs:
        """The least that serves all these rows."""
        return Needs(
            Level(int(self._levels[rows].max(initial=Level.GREEDY))), int(self._logprobs[rows].max(initial=-1)),
            candidates=int(self._candidates[rows].max(initial=0)),
        )  # fmt: skip
