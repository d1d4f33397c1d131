"""Prefixes that are being computed: who needs one waits for its blocks where that is cheaper than to compute it again.

Prompts are computed in the order of arrival, so who waits loses no more than the rest of one step. If the sequence
that computes the prefix ends before, the next one computes it.
"""

from jaxinfer.engine.request import Sequence

LEAST_SHARED = 1 / 32
"""Of the tokens of a step: a prefix of fewer is computed again rather than waited for."""


class Computing:
    """By digest, the running sequence that is about to compute and publish a block."""

    def __init__(self) -> None:
        self._owners: dict[bytes, Sequence] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def announce(self, sequence: Sequence) -> None:
        """A sequence computes the blocks of its prompt from the first that is not published."""
        sequence.announced = len(sequence.digests)
        for digest in sequence.digests[sequence.published :]:
            self._owners.setdefault(digest, sequence)

    def retract(self, sequence: Sequence, stop: int) -> None:
        """Its blocks before number `stop` are published, or will not be computed."""
        for digest in sequence.digests[sequence.published : stop]:
            if self._owners.get(digest) is sequence:
                del self._owners[digest]

    def still_has(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence waits for a block that is still being computed."""
        if sequence.awaits in self._owners:
            return True
        sequence.awaits = None
        return False

    def has(self, sequence: Sequence, usable: int, least: float) -> bool:
        """Whether another request is computing `least` or more of the first `usable` blocks of a sequence, which then
        waits for the last of them.
        """
        owners = [(digest, self._owners.get(digest)) for digest in sequence.digests[:usable]]
        mine = None if sequence.request.beams else sequence.request  # samples share what they can as forks
        shared = [digest for digest, owner in owners if owner is not None and owner.request is not mine]
        if not shared or len(shared) < least:
            return False
        sequence.awaits = shared[-1]
        return True
