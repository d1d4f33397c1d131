"""What running prompts read of encoders: pinned in the feature pool while they are computed, or kept in the cache as
long as they run (`kv.encoded`); encoded first where it is not there.
"""

from typing import NamedTuple

import numpy as np

from jaxinfer.engine.request import Sequence
from jaxinfer.functional.encoder_batch import EncodeJob
from jaxinfer.kv import encoder_pool
from jaxinfer.kv.encoder_pool import FeaturePool, Held, Slots
from jaxinfer.media import CrossInputs, EncoderInput


class Offer(NamedTuple):
    """What a prompt would pin if it were admitted."""

    wanted: dict[bytes, EncoderInput]
    held: Held

    @property
    def fits(self) -> bool:
        """Whether there is room for all of it."""
        return self.held.fits


class Encoding:
    """By row, until its prompt is computed: the inputs it pins, and for each token its row of the feature pool."""

    def __init__(self, slots: int):
        self.pool = FeaturePool.create(slots)
        self.rows: dict[int, tuple[tuple[bytes, ...], np.ndarray]] = {}
        self._encodes: list[tuple[EncoderInput, Slots]] = []
        self._reads: list[EncodeJob] = []
        self._reused = 0

    def offer(self, sequence: Sequence, start: int) -> Offer:
        """Room for the inputs that the tokens of a sequence from position `start` on read; nothing is changed."""
        inputs = sequence.request.inputs
        wanted = {} if inputs is None else inputs.wanted(start)
        return Offer(wanted, encoder_pool.hold(self.pool, {digest: one.count for digest, one in wanted.items()}))

    def accept(self, sequence: Sequence, offer: Offer) -> None:
        """Pins an offer made to a sequence that has a row now."""
        if not offer.wanted:
            return
        wanted, held = offer
        self.pool = held.pool
        self._encodes += [(wanted[digest], held.slots[digest]) for digest in held.new]
        self._reused += len(wanted) - len(held.new)
        self.rows[sequence.row] = tuple(wanted), sequence.request.inputs.index(held.slots, sequence.length)

    def index(self, row: int, start: int, count: int) -> np.ndarray | None:
        """`[count]` int32: for positions from `start` on the row of the feature pool, -1 for none; None: none reads
        it."""
        return self.rows[row][1][start : start + count] if row in self.rows else None

    def release(self, row: int) -> None:
        """Lets go of what a row pins, once its steps are dispatched or it has left."""
        if row in self.rows:
            self.pool = encoder_pool.release(self.pool, self.rows.pop(row)[0])

    def has_room(self, cross: CrossInputs, most: int) -> bool:
        """Whether a step that encodes `most` values for cross-attention can have another request's; one alone
        always."""
        units = sum(job.input.count for job in self._reads)
        return not units or units + sum(one.count for one in cross.inputs) <= most

    def read(self, cross: CrossInputs | None, blocks: np.ndarray | None) -> None:
        """A prompt was admitted that attends to these inputs, in blocks `[m, n]`; None: they are there already."""
        if cross is None:
            return
        if blocks is None:
            self._reused += len(cross.inputs)
            return
        first = 0
        for one in cross.inputs:
            self._reads.append(EncodeJob(one, blocks, first))
            first += one.length

    def take(self) -> tuple[list[tuple[EncoderInput, Slots]], list[EncodeJob], int]:
        """What was accepted since the last call: the inputs to encode with their slots, those with their blocks, and
        how many were there already."""
        taken = self._encodes, self._reads, self._reused
        self._encodes, self._reads, self._reused = [], [], 0
        return taken

    def forget(self) -> None:
        """Lets go of all inputs but those that running prompts are about to read."""
        self.pool = encoder_pool.forget(self.pool)

    def check(self) -> None:
        """The invariants of the feature pool.

        Raises:
            PoolInvariantError: one does not hold; the message carries the accounting.
        """
        encoder_pool.check(self.pool, [digests for digests, _ in self.rows.values()])
