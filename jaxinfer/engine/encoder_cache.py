"""Encoder inputs of running prompts: pinned in the feature pool, or stored in the cache for cross-attention.

The feature pool holds inputs during prefill. Inputs that are in neither are encoded first. Cross-attention entries stay
as long as their sequence runs (`kv.cross_cache`).
"""

from typing import NamedTuple

import numpy as np

from jaxinfer.engine.request import Sequence
from jaxinfer.functional.encoder_batch import EncodeJob
from jaxinfer.kv import encoder_pool
from jaxinfer.kv.encoder_pool import FeaturePool, Held, Slots
from jaxinfer.media import CrossInputs, EncoderInput


class Reservation(NamedTuple):
    """Encoder inputs that a prompt would pin if it were admitted."""

    wanted: dict[bytes, EncoderInput]
    held: Held

    @property
    def fits(self) -> bool:
        """Whether the feature pool has room for all of them."""
        return self.held.fits


class EncoderCache:
    """Inputs pinned by each prefilling row, and the feature pool row of each of its tokens."""

    def __init__(self, slots: int):
        self.pool = FeaturePool.create(slots)
        self.rows: dict[int, tuple[tuple[bytes, ...], np.ndarray]] = {}
        self._encodes: list[tuple[EncoderInput, Slots]] = []
        self._reads: list[EncodeJob] = []
        self._reused = 0

    def find_room(self, sequence: Sequence, start: int) -> Reservation:
        """Check for room for the inputs that tokens from position `start` on read; no state is changed."""
        inputs = sequence.request.inputs
        wanted = {} if inputs is None else inputs.wanted(start)
        return Reservation(wanted, encoder_pool.hold(self.pool, {digest: one.count for digest, one in wanted.items()}))

    def pin(self, sequence: Sequence, reservation: Reservation) -> None:
        """Pin the inputs of a reservation for a sequence that has been given a row."""
        if not reservation.wanted:
            return
        wanted, held = reservation
        self.pool = held.pool
        self._encodes += [(wanted[digest], held.slots[digest]) for digest in held.new]
        self._reused += len(wanted) - len(held.new)
        self.rows[sequence.row] = tuple(wanted), sequence.request.inputs.index(held.slots, sequence.length)

    def feature_rows(self, row: int, start: int, count: int) -> np.ndarray | None:
        """Return the feature pool row of `count` positions from `start` on, `[count]` int32; None if none reads it.

        Text tokens have row -1.
        """
        return self.rows[row][1][start : start + count] if row in self.rows else None

    def release(self, row: int) -> None:
        """Unpin a row's inputs once its prefill is dispatched or it has left."""
        if row in self.rows:
            self.pool = encoder_pool.release(self.pool, self.rows.pop(row)[0])

    def has_cross_room(self, cross: CrossInputs, most: int) -> bool:
        """Return whether a step that encodes at most `most` values for cross-attention has room for a request's inputs.

        A step with no other inputs always has.
        """
        units = sum(job.input.count for job in self._reads)
        return not units or units + sum(one.count for one in cross.inputs) <= most

    def add_cross(self, cross: CrossInputs | None, blocks: np.ndarray | None) -> None:
        """Queue an admitted prompt's encoder inputs for encoding into blocks `[m, n]`; None if already cached."""
        if cross is None:
            return
        if blocks is None:
            self._reused += len(cross.inputs)
            return
        first = 0
        for one in cross.inputs:
            self._reads.append(EncodeJob(one, blocks, first))
            first += one.length

    def take_scheduled(self) -> tuple[list[tuple[EncoderInput, Slots]], list[EncodeJob], int]:
        """Return and clear what was accepted since the last call.

        Returns:
            The inputs to encode with their feature pool slots, the jobs to encode into cache blocks, and the number of
            inputs that were already cached.
        """
        taken = self._encodes, self._reads, self._reused
        self._encodes, self._reads, self._reused = [], [], 0
        return taken

    def reset(self) -> None:
        """Drop all inputs except those that running prompts will read."""
        self.pool = encoder_pool.forget(self.pool)

    def check(self) -> None:
        """Check the invariants of the feature pool.

        Raises:
            PoolInvariantError: one is violated; the message carries the accounting.
        """
        encoder_pool.check(self.pool, [digests for digests, _ in self.rows.values()])
