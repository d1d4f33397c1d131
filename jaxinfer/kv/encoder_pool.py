"""Host bookkeeping of the encoder feature pool: which encoded inputs are in device memory. An immutable value.

The feature pool is one array `[F, M]` of encoder outputs, cut into slots that hold the output of one encoder value (for
images: a tile). An input takes one slot per value, not necessarily adjacent. Inputs are keyed by the digest of their
content, so repeated inputs hit. Inputs that a running sequence reads are pinned; the others are evicted, least recently
used first, when their slots are needed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxinfer.kv.pool import PoolInvariantError

Slots = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One input in the pool."""

    slots: Slots
    """Slots of its values, in order."""
    pins: int
    """Number of sequences that read it."""


@dataclass(frozen=True)
class FeaturePool:
    """Slots and their contents. Immutable: every operation returns a new pool."""

    size: int
    free: Slots
    entries: Mapping[bytes, Entry]
    """Inputs by digest, least recently used first."""

    @classmethod
    def create(cls, size: int) -> "FeaturePool":
        """Create an empty pool of `size` slots."""
        return cls(size, tuple(range(size)), {})

    @property
    def num_pinned(self) -> int:
        """Slots that cannot be evicted."""
        return sum(len(entry.slots) for entry in self.entries.values() if entry.pins)


class Held(NamedTuple):
    """Result of pinning inputs."""

    pool: FeaturePool
    """The pool with the inputs pinned; unchanged if they do not fit."""
    slots: dict[bytes, Slots]
    """Slots of each input, by digest."""
    new: tuple[bytes, ...]
    """Digests of inputs that still have to be encoded."""
    fits: bool


def hold(pool: FeaturePool, wanted: Mapping[bytes, int]) -> Held:
    """Pin inputs in the pool, all of them or none.

    Missing inputs get free slots first, then those of the least recently used unpinned inputs.

    Args:
        pool: the pool.
        wanted: number of slots of each input, by digest.
    """
    if not wanted:
        return Held(pool, {}, (), True)
    entries, free = dict(pool.entries), list(pool.free)
    for digest in wanted:
        if digest in entries:
            found = entries.pop(digest)  # put back at the end: most recently used
            entries[digest] = replace(found, pins=found.pins + 1)
    missing = {digest: count for digest, count in wanted.items() if digest not in entries}
    needed = sum(missing.values())
    for digest in pool.entries:
        if len(free) >= needed:
            break
        if not entries[digest].pins:
            free.extend(entries.pop(digest).slots)
    if len(free) < needed:
        return Held(pool, {}, (), False)
    for digest, count in missing.items():
        entries[digest], free = Entry(tuple(free[:count]), 1), free[count:]
    slots = {digest: entries[digest].slots for digest in wanted}
    return Held(FeaturePool(pool.size, tuple(free), entries), slots, tuple(missing), True)


def release(pool: FeaturePool, digests: Iterable[bytes]) -> FeaturePool:
    """Remove one pin from each input; unpinned inputs stay until their slots are needed.

    Raises:
        PoolInvariantError: an input is not pinned.
    """
    entries = dict(pool.entries)
    for digest in digests:
        entry = entries.get(digest)
        if entry is None or not entry.pins:
            raise PoolInvariantError(f"input {digest.hex()[:12]} of the feature pool is released but not pinned")
        entries[digest] = replace(entry, pins=entry.pins - 1)
    return replace(pool, entries=entries)


def forget(pool: FeaturePool) -> FeaturePool:
    """Drop all unpinned inputs, as after a weight update."""
    pinned = {digest: entry for digest, entry in pool.entries.items() if entry.pins}
    gone = (slot for digest, entry in pool.entries.items() if digest not in pinned for slot in entry.slots)
    return replace(pool, free=(*pool.free, *gone), entries=pinned)


def check(pool: FeaturePool, holders: Iterable[Iterable[bytes]]) -> None:
    """Check that every slot is free or used exactly once, and that pins equal the number of holders of each input.

    Raises:
        PoolInvariantError: an invariant is violated; the message carries the accounting.
    """
    slots = sorted([*pool.free, *(slot for entry in pool.entries.values() for slot in entry.slots)])
    pins: dict[bytes, int] = {}
    for digests in holders:
        for digest in digests:
            pins[digest] = pins.get(digest, 0) + 1
    counted = {digest: entry.pins for digest, entry in pool.entries.items() if entry.pins}
    if slots != list(range(pool.size)) or counted != pins:
        raise PoolInvariantError(
            f"feature pool of {pool.size} slots: {len(pool.free)} free and "
            f"{sum(len(e.slots) for e in pool.entries.values())} in use by {len(pool.entries)} inputs; "
            f"{sum(counted.values())} pins counted, {sum(pins.values())} held"
        )
