"""The host's view of recurrent state: which slot each row's state is in, and which slots are snapshots that others may
find.

A slot holds what all recurrent layers remember of a sequence up to some position. A step reads a row's state in one
slot and writes it to one, mostly the same; where the first is shared or is to be kept, to another. So a fork is a
reference, and a snapshot is a slot left behind: nothing is ever copied. Snapshots lie on block boundaries: where a
prompt parts from those before it, at its last one, and at the last one of what is generated.

Slots have a pool of their own, apart from the blocks of attention; a snapshot is cached, found and evicted as they are.
In the prefix index, whose ids are of blocks, slot `i` is number `first + i`.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxinfer.kv import pool as pools
from jaxinfer.kv.pool import BlockPool
from jaxinfer.kv.prefix import NO_EXTRAS, Extras, PrefixIndex

NOWHERE = -1
"""No slot: to be read as zeroes, the state before a first token."""


class Segment(NamedTuple):
    """A part of a chunk of a prompt: the state after its last token is written to a slot."""

    count: int
    """Tokens."""
    source: int
    """The slot it goes on from; NOWHERE: a beginning, or the segment before it in the chunk."""
    target: int
    continues: bool
    """Whether it goes on from the segment before it."""


class RecurrentStates:
    """The slots of rows. A row's `current` one has its state at position `at`; what it `kept` waits to be published."""

    def __init__(self, slots: int, rows: int, index: PrefixIndex, first: int, *, keep: bool = True):
        """Of at least `2 * rows` slots, so that all rows can move in one plan; their kind is the index's last.

        `keep`: whether snapshots are left behind.
        """
        if slots < 2 * rows:
            raise ValueError(f"slots must be at least twice the rows, {2 * rows}, got {slots}.")
        self.pool = BlockPool.create(slots)
        self.current = np.full(rows, NOWHERE, np.int32)
        self.at = np.zeros(rows, np.int64)
        self.keep = keep
        self.kept: dict[int, list[tuple[int, int]]] = {}
        """Of a row: positions, block boundaries all, and the slots with its state there, not published yet."""
        self._last: dict[int, tuple[int, bytes]] = {}
        """Of a row: its latest snapshot of what it generated, a better one of which replaces it."""
        self._boundaries: dict[int, frozenset[int]] = {}
        """Of a row: positions of its prompt whose states are to be found."""
        self._size, self._index, self._kind, self._first = index.block_size, index, index.kinds - 1, first
        self._evicted: list[np.ndarray] = []
        self._left: list[int] = []
        """Slots that rows have left in this plan, whose steps still read them."""
        self._moved = np.zeros(rows, bool)
        """Rows that have taken a slot in this plan; each other one has a slot reserved for it."""

    @property
    def published(self) -> np.ndarray:
        """`[N]` which slots are snapshots in the index."""
        return self.pool.published

    def admit(self, row: int, number: int | None, blocks: int, boundaries: Iterable[int] = ()) -> None:
        """Lets an empty row begin, or go on from the snapshot of this number in the index.

        `blocks`: how far it is; `boundaries`: of its prompt, in blocks, whose states others may go on from.
        """
        slot = NOWHERE if number is None else number - self._first
        if slot != NOWHERE:
            self.pool = pools.share(self.pool, [slot])
        self.current[row], self.at[row] = slot, blocks * self._size
        self._boundaries[row] = frozenset(end * self._size for end in boundaries if self.keep)

    def begin(self) -> None:
        """A plan begins: what the one before has read may be written. There are slots for all rows to move.

        What was kept and not published yet is given up where there would be too few.
        """
        self.pool = pools.release(self.pool, self._left)
        self._left = []
        self._moved[:] = False
        for row in list(self.kept):
            if self.pool.num_available >= len(self.current):
                break
            self._drop_kept(row)

    def chunk(self, row: int, stop: int) -> list[Segment]:
        """Moves a row's state to position `stop`, leaving snapshots at those of its boundaries that lie before it."""
        start, source, boundaries = int(self.at[row]), int(self.current[row]), self._boundaries[row]
        inside = sorted({b for b in boundaries if start < b < stop})
        if self._spare < len(inside):
            inside = []
        ends = [*inside, stop]
        in_place = not inside and source != NOWHERE and not self._must_leave(row, start in boundaries)
        targets = [source] if in_place else self._take(len(ends)).tolist()
        if not in_place:
            self._moved[row] = True
            self._leave_behind(row, start in boundaries)
            self.kept.setdefault(row, []).extend(zip(inside, targets, strict=False))
        self.current[row], self.at[row] = targets[-1], stop
        starts = [start, *inside]
        return [
            Segment(end - begin, NOWHERE if i else source, target, bool(i))
            for i, (begin, end, target) in enumerate(zip(starts, ends, targets, strict=True))
        ]

    def step(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Moves the state of rows `[B]` one token on; the slots `[B]` that are read and those that are written."""
        sources, pool = self.current[rows], self.pool
        must = (pool.refs[sources] > 1) | pool.published[sources]
        boundary = self.at[rows] % self._size == 0 if self.keep else np.zeros(len(rows), bool)
        moving = np.flatnonzero(must | boundary)
        first = ~self._moved[rows[moving]]
        fresh = iter(self._take(int(first.sum())).tolist()) if first.any() else iter(())
        for index, is_first in zip(moving.tolist(), first.tolist(), strict=True):
            row = int(rows[index])
            slot = next(fresh) if is_first else self._another(row, bool(must[index]))
            if slot is not None:
                self._leave_behind(row, bool(boundary[index]))
                self.current[row], self._moved[row] = slot, True
        self.at[rows] += 1
        return sources, self.current[rows]

    @property
    def _spare(self) -> int:
        """Slots that no row of this plan has reserved."""
        return self.pool.num_available - int((~self._moved).sum())

    def _another(self, row: int, must: bool) -> int | None:
        """Return a slot for a row that has moved in this plan before, or None: then no state is kept at its position.

        A plan of many steps passes several block boundaries. Where no slot is to spare, the state that is kept of what
        the row generated is replaced by the later one, in its slot: steps run in order, so it has been read by then. It
            is not
        released, as a chunk of a prompt, which runs before the steps, could take it.
        """
        if must or self._spare > 0:
            return int(self._take(1)[0])
        position, slot = self.kept[row][-1] if self.kept.get(row) else (0, NOWHERE)
        if position <= max(self._boundaries[row], default=0) or self.pool.refs[slot] > 1:
            return None
        self.kept[row].pop()
        return slot

    def _must_leave(self, row: int, wanted: bool) -> bool:
        """Whether a row may not write to its slot: others have it as well, or it is kept."""
        slot = self.current[row]
        return wanted or bool(self.pool.refs[slot] > 1 or self.pool.published[slot])

    def _leave_behind(self, row: int, wanted: bool) -> None:
        """Takes its slot from a row: kept until it is published, if that is wanted and has not happened."""
        slot = int(self.current[row])
        if slot == NOWHERE:
            return
        if wanted and not self.pool.published[slot]:
            self.kept.setdefault(row, []).append((int(self.at[row]), slot))
        else:
            self._left.append(slot)

    def _take(self, count: int) -> np.ndarray:
        self.pool, ids, evicted, fits = pools.allocate(self.pool, count)
        if not fits:
            raise pools.PoolInvariantError(f"{count} slots are wanted, {self.pool.num_available} are to be had.")
        if len(evicted):
            self._evicted.append(evicted + self._first)
        return ids

    def _drop_kept(self, row: int) -> None:
        for _, slot in self.kept.pop(row, ()):
            self.pool = pools.release(self.pool, [slot])

    def fork(self, source: int, target: int) -> None:
        """Lets row `target` go on from where `source` is."""
        self.pool = pools.share(self.pool, self.current[[source]])
        self.current[target], self.at[target] = self.current[source], self.at[source]
        self._boundaries[target] = self._boundaries[source]

    def free(self, row: int) -> None:
        """Gives up what a row has; snapshots stay until they are evicted."""
        self._drop_kept(row)
        if self.current[row] != NOWHERE:
            self.pool = pools.release(self.pool, self.current[[row]])
        self.current[row], self.at[row] = NOWHERE, 0
        self._last.pop(row, None)
        self._boundaries.pop(row, None)

    def publish(
        self, row: int, tokens: np.ndarray, digests: Sequence[bytes], root: bytes, stop: int, extras: Extras = NO_EXTRAS
    ) -> None:
        """Enters a row's states up to block `stop`, whose tokens are known and whose nodes are in the index.

        Args:
            row: whose.
            tokens: the known ones, `[T]`.
            digests: of their full blocks.
            root: the parent of the first.
            stop: blocks.
            extras: what beside their tokens decides their content.
        """
        boundaries = self._boundaries[row]
        waiting, limit = self.kept.pop(row, []), stop * self._size
        ready = [one for one in waiting if one[0] <= limit]
        if rest := [one for one in waiting if one[0] > limit]:
            self.kept[row] = rest
        for position, slot in ready:
            self._enter(row, slot, position, tokens, digests, root, extras)
            self.pool = pools.release(self.pool, [slot])
        position, slot = int(self.at[row]), int(self.current[row])
        wanted = position in boundaries or position > max(boundaries, default=0)
        if wanted and slot != NOWHERE and 0 < position <= limit and not position % self._size:
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
        # Of what is generated the latest replaces the one before.
        before = self._last.get(row)
        self._last[row] = (slot, digest)
        if before is not None and self._is(*before):
            self.withdraw([self._first + before[0]])
            self._index.evict([self._first + before[0]])

    def _is(self, slot: int, digest: bytes) -> bool:
        """Whether a slot is still the snapshot of this node, and nobody's."""
        nodes = self._index.nodes([digest])
        same = bool(nodes) and nodes[0].ids[self._kind] == (self._first + slot,)
        return same and not int(self.pool.refs[slot])

    def take_evicted(self) -> list[np.ndarray]:
        """Numbers in the index of the snapshots that have been overwritten, or are about to be, since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def withdraw(self, numbers: Iterable[int]) -> None:
        """What of these has left the index is published no longer; numbers of blocks are passed over."""
        slots = [number - self._first for number in numbers if number >= self._first]
        if slots:
            self.pool = pools.unpublish(self.pool, slots)

    def reset_published(self) -> None:
        """Forgets all snapshots."""
        self._evicted.clear()
        self._last.clear()
        for row in list(self.kept):
            self._drop_kept(row)
        self.pool = pools.reset_published(self.pool)

    def check(self) -> list[int]:
        """Every reference is a row's. Numbers in the index of what is published.

        Raises:
            PoolInvariantError: one is not.
        """
        kept = [[slot for _, slot in some] for some in self.kept.values()]
        pools.check(self.pool, [self.current[self.current >= 0], np.array(self._left, np.int32), *map(np.array, kept)])
        return (np.flatnonzero(self.pool.published) + self._first).tolist()
