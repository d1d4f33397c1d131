"""Which encoded inputs lie in the device's feature pool: the host's accounting, a value like the block pool's.

The feature pool is one array `[F, M]` of rows that encoders have made. It is cut into slots, one for what an encoder
makes of one value (of an image: a tile); an input takes as many slots as it has values, anywhere. Inputs are known by
the digest of their content, so that one that comes again is found. Those that a sequence still reads are pinned; the
others stay until their slots are needed, and the least recently used goes first.
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
    """Where its values lie, in their order."""
    pins: int
    """Sequences that still read it."""


@dataclass(frozen=True)
class FeaturePool:
    """Slots and what lies in them. Never changed: every operation gives a new one."""

    size: int
    free: Slots
    entries: Mapping[bytes, Entry]
    """By digest, the least recently used first."""

    @classmethod
    def create(cls, size: int) -> "FeaturePool":
        """An empty pool of `size` slots."""
        return cls(size, tuple(range(size)), {})

    @property
    def num_pinned(self) -> int:
        """Slots that may not be taken."""
        return sum(len(entry.slots) for entry in self.entries.values() if entry.pins)


class Held(NamedTuple):
    """What came of asking for inputs."""

    pool: FeaturePool
    """As it is with them pinned; unchanged if they do not fit."""
    slots: dict[bytes, Slots]
    """Where each of them lies."""
    new: tuple[bytes, ...]
    """Those that are still to be encoded."""
    fits: bool


def hold(pool: FeaturePool, wanted: Mapping[bytes, int]) -> Held:
    """Pins inputs, `wanted`: the slots each of them takes by digest; all of them or none.

    What is not there gets free slots, then those of the least recently used inputs that nobody reads.
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
    """Takes one pin off each of these inputs; they stay until their slots are needed.

    Raises:
        PoolInvariantError: one that is not pinned.
    """
    entries = dict(pool.entries)
    for digest in digests:
        entry = entries.get(digest)
        if entry is None or not entry.pins:
            raise PoolInvariantError(f"input {digest.hex()[:12]} of the feature pool is released, but nobody holds it")
        entries[digest] = replace(entry, pins=entry.pins - 1)
    return replace(pool, entries=entries)


def forget(pool: FeaturePool) -> FeaturePool:
    """Without the inputs that nobody reads, as after new weights."""
    kept = {digest: entry for digest, entry in pool.entries.items() if entry.pins}
    gone = (slot for digest, entry in pool.entries.items() if digest not in kept for slot in entry.slots)
    return replace(pool, free=(*pool.free, *gone), entries=kept)


def check(pool: FeaturePool, holders: Iterable[Iterable[bytes]]) -> None:
    """Whether every slot is in one place, and every input has as many pins as there are holders of it.

    Raises:
        PoolInvariantError: not so; the message carries the accounting.
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
