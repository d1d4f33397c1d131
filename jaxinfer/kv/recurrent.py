"""Host bookkeeping of recurrent state: the slot of each row's state, and the slots cached as snapshots.

A slot holds the state of all recurrent layers of a sequence after some position. A step reads a row's state from one
slot and writes it to a slot, usually the same one; if the slot is shared or has to be kept, it writes to another. A
fork is therefore one more reference, and a snapshot is a slot left behind: state is never copied. Snapshots are taken
at block boundaries: where a prompt diverges from earlier ones, at the prompt's last boundary, and at the last boundary
of the generated tokens.

Slots have their own pool, apart from attention blocks; snapshots are cached, found and evicted like blocks. In the
prefix index slots share the number space of blocks: slot `i` is number `first + i`.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxinfer.kv import pool as pools
from jaxinfer.kv import pool_check
from jaxinfer.kv.digests import NO_EXTRAS, Extras
from jaxinfer.kv.pool import BlockPool
from jaxinfer.kv.prefix import PrefixIndex

NO_SLOT = -1
"""No slot: read as zeros, the state before the first token."""


class Segment(NamedTuple):
    """Part of a prefill chunk; the state after its last token is written to a slot."""

    count: int
    """Tokens."""
    source: int
    """Slot of the initial state; NO_SLOT at the start of a sequence or after another segment of the chunk."""
    target: int
    continues: bool
    """Whether the initial state comes from the previous segment of the chunk."""


class RecurrentStates:
    """State slots of rows: slot `current[r]` has row r's state after `positions[r]` tokens."""

    def __init__(self, slots: int, rows: int, index: PrefixIndex, first: int, *, snapshots: bool = True):
        """Create the slots; recurrent layers are the last kind of the index.

        Args:
            slots: at least `2 * rows`, so that every row can move to a new slot in one plan.
            rows: rows of the batch.
            index: the prefix index.
            first: number of slot 0 in the index.
            snapshots: whether to leave snapshots behind.
        """
        if slots < 2 * rows:
            raise ValueError(f"slots must be at least {2 * rows}, twice the rows, got {slots}.")
        self.pool = BlockPool.create(slots)
        self.current = np.full(rows, NO_SLOT, np.int32)
        self.positions = np.zeros(rows, np.int64)
        self.snapshots = snapshots
        self.unpublished: dict[int, list[tuple[int, int]]] = {}
        """Per row: unpublished snapshots as (position at a block boundary, slot)."""
        self._latest: dict[int, tuple[int, bytes]] = {}
        """Per row: its latest snapshot of generated tokens, replaced by the next one."""
        self._boundaries: dict[int, frozenset[int]] = {}
        """Per row: positions of its prompt to snapshot."""
        self._size, self._index, self._kind, self._first = index.block_size, index, index.kinds - 1, first
        self._evicted: list[np.ndarray] = []
        self._to_release: list[int] = []
        """Slots that rows have left in this plan and whose steps still read them."""
        self._moved = np.zeros(rows, bool)
        """Rows that have taken a slot in this plan; every other row has one reserved."""

    @property
    def published(self) -> np.ndarray:
        """Which slots are snapshots in the index, `[N]` bool."""
        return self.pool.published

    def admit(self, row: int, number: int | None, blocks: int, boundaries: Iterable[int] = ()) -> None:
        """Start an empty row from zero state or from a snapshot.

        Args:
            row: the row.
            number: number of the snapshot in the index; None to start from zero.
            blocks: blocks already computed.
            boundaries: ends of prompt prefixes, in blocks, whose states other requests may continue from.
        """
        slot = NO_SLOT if number is None else number - self._first
        if slot != NO_SLOT:
            self.pool = pools.share(self.pool, [slot])
        self.current[row], self.positions[row] = slot, blocks * self._size
        self._boundaries[row] = frozenset(end * self._size for end in boundaries if self.snapshots)

    def begin(self) -> None:
        """Begin a plan: slots read by the previous plan may now be written.

        Guarantees a slot for every row to move to; drops unpublished snapshots if there are too few.
        """
        self.pool = pools.release(self.pool, self._to_release)
        self._to_release = []
        self._moved[:] = False
        for row in list(self.unpublished):
            if self.pool.num_available >= len(self.current):
                break
            self._drop_unpublished(row)

    def chunk(self, row: int, stop: int) -> list[Segment]:
        """Advance a row's state to position `stop`, leaving snapshots at the boundaries it passes."""
        start, source, boundaries = int(self.positions[row]), int(self.current[row]), self._boundaries[row]
        inside = sorted({b for b in boundaries if start < b < stop})
        if self._spare < len(inside):
            inside = []
        ends = [*inside, stop]
        in_place = not inside and source != NO_SLOT and not self._must_leave(row, start in boundaries)
        targets = [source] if in_place else self._take(len(ends)).tolist()
        if not in_place:
            self._moved[row] = True
            self._leave_behind(row, start in boundaries)
            self.unpublished.setdefault(row, []).extend(zip(inside, targets, strict=False))
        self.current[row], self.positions[row] = targets[-1], stop
        starts = [start, *inside]
        return [
            Segment(end - begin, NO_SLOT if i else source, target, bool(i))
            for i, (begin, end, target) in enumerate(zip(starts, ends, targets, strict=True))
        ]

    def step(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Advance the state of rows `[B]` by one token; return the slots read and the slots written, each `[B]`."""
        sources, pool = self.current[rows], self.pool
        must = (pool.refs[sources] > 1) | pool.published[sources]
        boundary = self.positions[rows] % self._size == 0 if self.snapshots else np.zeros(len(rows), bool)
        moving = np.flatnonzero(must | boundary)
        first = ~self._moved[rows[moving]]
        fresh = iter(self._take(int(first.sum())).tolist()) if first.any() else iter(())
        for index, is_first in zip(moving.tolist(), first.tolist(), strict=True):
            row = int(rows[index])
            slot = next(fresh) if is_first else self._another(row, bool(must[index]))
            if slot is not None:
                self._leave_behind(row, bool(boundary[index]))
                self.current[row], self._moved[row] = slot, True
        self.positions[rows] += 1
        return sources, self.current[rows]

    @property
    def _spare(self) -> int:
        """Available slots that no row of this plan has reserved."""
        return self.pool.num_available - int((~self._moved).sum())

    def _another(self, row: int, must: bool) -> int | None:
        """Return a slot for a row that has already moved in this plan, or None to skip the snapshot at its position.

        A plan of many steps passes several block boundaries. If no slot is to spare, the row's latest snapshot of
        generated tokens is replaced, in its slot, by the new one: steps run in order, so it has been read by then. The
        slot is not released, because a prefill chunk, which runs before the steps, could take it.
        """
        if must or self._spare > 0:
            return int(self._take(1)[0])
        position, slot = self.unpublished[row][-1] if self.unpublished.get(row) else (0, NO_SLOT)
        if position <= max(self._boundaries[row], default=0) or self.pool.refs[slot] > 1:
            return None
        self.unpublished[row].pop()
        return slot

    def _must_leave(self, row: int, wanted: bool) -> bool:
        """Return whether a row must write to another slot, because its slot is shared or to be kept."""
        slot = self.current[row]
        return wanted or bool(self.pool.refs[slot] > 1 or self.pool.published[slot])

    def _leave_behind(self, row: int, wanted: bool) -> None:
        """Detach a row from its slot, keeping it as an unpublished snapshot if wanted and not yet published."""
        slot = int(self.current[row])
        if slot == NO_SLOT:
            return
        if wanted and not self.pool.published[slot]:
            self.unpublished.setdefault(row, []).append((int(self.positions[row]), slot))
        else:
            self._to_release.append(slot)

    def _take(self, count: int) -> np.ndarray:
        self.pool, ids, evicted, fits = pools.allocate(self.pool, count)
        if not fits:
            raise pools.PoolInvariantError(
                f"{count} state slots are needed, but only {self.pool.num_available} are available."
            )
        if len(evicted):
            self._evicted.append(evicted + self._first)
            self._index.mark_changed()
        return ids

    def _drop_unpublished(self, row: int) -> None:
        for _, slot in self.unpublished.pop(row, ()):
            self.pool = pools.release(self.pool, [slot])

    def fork(self, source: int, target: int) -> None:
        """Make row `target` continue from the state of row `source`."""
        self.pool = pools.share(self.pool, self.current[[source]])
        self.current[target], self.positions[target] = self.current[source], self.positions[source]
        self._boundaries[target] = self._boundaries[source]

    def free(self, row: int) -> None:
        """Release a row's slots; published snapshots stay until evicted."""
        self._drop_unpublished(row)
        if self.current[row] != NO_SLOT:
            self.pool = pools.release(self.pool, self.current[[row]])
        self.current[row], self.positions[row] = NO_SLOT, 0
        self._latest.pop(row, None)
        self._boundaries.pop(row, None)

    def publish(
        self, row: int, tokens: np.ndarray, digests: Sequence[bytes], root: bytes, stop: int, extras: Extras = NO_EXTRAS
    ) -> None:
        """Enter a row's snapshots up to block `stop` in the index, where the nodes of its blocks already are.

        Args:
            row: the row.
            tokens: its known tokens, `[T]`.
            digests: chained digests of their full blocks.
            root: parent digest of the first block.
            stop: end of the blocks whose tokens are known.
            extras: extra content of blocks, by block number.
        """
        boundaries = self._boundaries[row]
        waiting, limit = self.unpublished.pop(row, []), stop * self._size
        ready = [one for one in waiting if one[0] <= limit]
        if rest := [one for one in waiting if one[0] > limit]:
            self.unpublished[row] = rest
        for position, slot in ready:
            self._enter(row, slot, position, tokens, digests, root, extras)
            self.pool = pools.release(self.pool, [slot])
        position, slot = int(self.positions[row]), int(self.current[row])
        wanted = position in boundaries or position > max(boundaries, default=0)
        if wanted and slot != NO_SLOT and 0 < position <= limit and not position % self._size:
            self._enter(row, slot, position, tokens, digests, root, extras)

    def _enter(
        self,
        row: int,
        slot: int,
        position: int,
        tokens: np.ndarray,
        digests: Sequence[bytes],
        root: bytes,
        extras: Extras,
    ) -> None:
        number = position // self._size - 1
        digest, parent = digests[number], digests[number - 1] if number else root
        if digest not in self._index or self.pool.published[slot]:
            return
        known, extra = tokens[number * self._size : position], extras.get(number, b"")
        if not self._index.insert(digest, parent, known, [self._first + slot], self._kind, extra):
            return
        self.pool = pools.publish(self.pool, [slot])
        if position <= max(self._boundaries[row], default=0):
            return
        # Keep only the latest snapshot of the generated tokens.
        before = self._latest.get(row)
        self._latest[row] = (slot, digest)
        if before is not None and self._is_unheld_snapshot(*before):
            self.withdraw([self._first + before[0]])
            self._index.evict([self._first + before[0]])

    def _is_unheld_snapshot(self, slot: int, digest: bytes) -> bool:
        """Return whether a slot is still the snapshot of this node and held by no row."""
        nodes = self._index.nodes([digest])
        same = bool(nodes) and nodes[0].ids[self._kind] == (self._first + slot,)
        return same and not int(self.pool.refs[slot])

    def take_evicted(self) -> list[np.ndarray]:
        """Return the index numbers of snapshots evicted since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def withdraw(self, numbers: Iterable[int]) -> None:
        """Unpublish the slots among these index numbers, which left the index; block numbers are skipped."""
        slots = [number - self._first for number in numbers if number >= self._first]
        if slots:
            self.pool = pools.unpublish(self.pool, slots)

    def reset_published(self) -> None:
        """Unpublish all snapshots."""
        self._evicted.clear()
        self._latest.clear()
        for row in list(self.unpublished):
            self._drop_unpublished(row)
        self.pool = pools.reset_published(self.pool)

    def check(self) -> list[int]:
        """Check that every reference to a slot is a row's.

        Returns:
            Index numbers of the published slots.

        Raises:
            PoolInvariantError: a reference is unaccounted for.
        """
        unpublished = [[slot for _, slot in some] for some in self.unpublished.values()]
        pool_check.check(
            self.pool,
            [self.current[self.current >= 0], np.array(self._to_release, np.int32), *map(np.array, unpublished)],
        )
        return (np.flatnonzero(self.pool.published) + self._first).tolist()
