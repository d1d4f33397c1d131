"""Prefixes in flight: track prefixes being prefilled, so that later requests wait and share instead of recomputing.

Prompts are prefilled in order of arrival, so waiting costs at most the rest of one step. If the sequence that computes
the prefix ends early, the next one computes it.
"""

import itertools

from jaxinfer.engine.request import Sequence

_versions = itertools.count(1)

LEAST_SHARED = 1 / 32
"""Minimum length of a shared prefix to wait for, as a fraction of a step's token budget; shorter ones are
recomputed.
"""


class InflightPrefixes:
    """Map from block digest to the running sequence that will compute and publish the block."""

    def __init__(self) -> None:
        self._owners: dict[bytes, Sequence] = {}
        self.version = next(_versions)
        """Changes with each registration: a sequence that need not wait is checked again only after the next one."""

    def __len__(self) -> int:
        return len(self._owners)

    def register(self, sequence: Sequence) -> None:
        """Register the unpublished prompt blocks of a sequence as being computed."""
        self.version = next(_versions)
        sequence.num_registered = len(sequence.digests)
        for digest in sequence.digests[sequence.published :]:
            self._owners.setdefault(digest, sequence)

    def unregister(self, sequence: Sequence, stop: int) -> None:
        """Unregister a sequence's blocks before index `stop`: they are published or will not be computed."""
        for digest in sequence.digests[sequence.published : stop]:
            if self._owners.get(digest) is sequence:
                del self._owners[digest]

    def still_waits(self, sequence: Sequence) -> bool:
        """Return whether the block a waiting sequence waits for is still being computed."""
        if sequence.awaited_digest in self._owners:
            return True
        sequence.awaited_digest = None
        return False

    def should_wait(self, sequence: Sequence, usable: int, least: float) -> bool:
        """Check whether other requests are computing at least `least` of the first `usable` blocks of a sequence.

        If so, the sequence waits for the last of them (`Sequence.awaited_digest`).
        """
        owners = [(digest, self._owners.get(digest)) for digest in sequence.digests[:usable]]
        mine = None if sequence.request.beams else sequence.request  # samples of one request share by forking
        shared = [digest for digest, owner in owners if owner is not None and owner.request is not mine]
        if not shared or len(shared) < least:
            return False
        sequence.awaited_digest = shared[-1]
        return True
