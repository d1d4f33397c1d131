"""The host's view of the paged cache: the pool, the prefix index and the tables, changed together.

Every method either succeeds as a whole or changes nothing. What a step evicts is collected, and leaves the
index when the step is committed to (`take_evicted`); until then a hit on such a block is cut off here, as
the pool no longer calls it published.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxinfer.kv import pool as pools
from jaxinfer.kv.pool import BlockPool
from jaxinfer.kv.prefix import NO_EXTRAS, Extras, MatchEnd, PrefixIndex
from jaxinfer.kv.tables import Tables


@dataclass(frozen=True)
class Hit:
    """What a prompt found in the prefix index."""

    ids: np.ndarray
    """The blocks, first first."""
    reason: str
    """Why there are no more."""


class BlockManager:
    """One pool of blocks, what is known of their contents, and who names them."""

    def __init__(self, num_blocks: int, rows: int, width: int, block_size: int, *, prefix_caching: bool = True):
        self.pool = BlockPool.create(num_blocks)
        self.index = PrefixIndex(block_size)
        self.tables = Tables(rows, width, block_size)
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._evicted: list[np.ndarray] = []
        self._entered: list[int] = []

    @property
    def pool(self) -> BlockPool:
        """The pool as it is now. What was published since it was last looked at is marked in one go."""
        if self._entered:
            self._pool = pools.publish(self._pool, np.array(self._entered, np.int32))
            self._entered = []
        return self._pool

    @pool.setter
    def pool(self, pool: BlockPool) -> None:
        self._pool = pool

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many positions."""
        return -(-tokens // self.block_size)

    def digests(
        self, tokens: np.ndarray, root: bytes, known: Sequence[bytes] = (), extras: Extras = NO_EXTRAS
    ) -> list[bytes]:
        """The chained digests of the full blocks of `tokens`; those already known are not computed again."""
        return self.index.chain(tokens, root, known, extras)

    def extend_digests(
        self, digests: list[bytes], tokens: np.ndarray, root: bytes, extras: Extras = NO_EXTRAS
    ) -> None:
        """Adds those of the full blocks of `tokens` that are missing at the end of `digests`, in place."""
        self.index.extend(digests, tokens, root, extras)

    def lookup(
        self, tokens: np.ndarray, digests: Sequence[bytes], root: bytes, extras: Extras = NO_EXTRAS
    ) -> Hit:
        """The longest usable prefix: at most floor((L - 1) / P) blocks, so that one token is left to compute."""
        if not self.prefix_caching:
            return Hit(np.empty(0, np.int32), "prefix caching is off")
        most = max(0, (len(tokens) - 1) // self.block_size)
        found = self.index.match(digests[:most], tokens, root, extras)
        ids = np.asarray(found.ids, np.int32)
        live = self.pool.published[ids] if len(ids) else np.empty(0, bool)
        if not live.all():
            return Hit(ids[: int(np.argmin(live))], str(MatchEnd.EVICTED))
        return Hit(ids, str(found.reason))

    def admit(self, row: int, hit: Hit, tokens: int) -> bool:
        """Gives a row the blocks of its hit and new ones for the rest of `tokens` positions, or nothing at all."""
        shared = pools.share(self.pool, hit.ids)
        pool, ids, evicted, fits = pools.allocate(shared, self.blocks_for(tokens) - len(hit.ids))
        if not fits:
            return False
        self.pool = pool
        self._evicted.append(evicted)
        self.tables.assign(row, np.concatenate([hit.ids, ids]), len(hit.ids) * self.block_size)
        return True

    def grow(self, rows: np.ndarray, steps: int = 1) -> tuple[np.ndarray, np.ndarray] | None:
        """Makes place for `steps` more positions in each row; None if the blocks do not suffice.

        A row at the end of its blocks gets new ones. A row about to write a block that others name as well
        gets a copy (copy-on-write), but the last of them writes in place.

        Returns:
            Sources and targets of the block copies that must run before the rows write.
        """
        tables, counts = self.tables, self.tables.counts[rows]
        lengths = tables.lengths[rows]
        at = lengths // self.block_size
        added = np.maximum((lengths + (steps - 1)) // self.block_size + 1 - counts, 0)
        current = np.where(at >= counts, -1, tables.blocks[rows, np.minimum(at, tables.blocks.shape[1] - 1)])
        copied = self._must_copy(current)
        new = int(added.sum())
        if not new and not len(copied):
            return current[copied], current[copied]
        pool, ids, evicted, fits = pools.allocate(self.pool, new + len(copied))
        if not fits:
            return None
        self._evicted.append(evicted)
        if new:
            self._append(rows, counts, added, ids[:new])
        targets, sources = ids[new:], current[copied]
        if len(copied):
            tables.blocks[rows[copied], at[copied]] = targets
            pool = pools.release(pool, sources)
        self.pool = pool
        return sources, targets

    def _append(self, rows: np.ndarray, counts: np.ndarray, added: np.ndarray, ids: np.ndarray) -> None:
        """Gives each row that many of the ids, behind the `counts` it has."""
        owners = np.repeat(rows, added)
        first = np.repeat(counts - (np.cumsum(added) - added), added)
        self.tables.blocks[owners, first + np.arange(len(ids))] = ids
        self.tables.counts[rows] += added

    def _must_copy(self, current: np.ndarray) -> np.ndarray:
        """Which of the rows that write blocks `current` may not write in place: their places in it."""
        shared = np.flatnonzero((current >= 0) & (self.pool.refs[current] > 1))
        if not len(shared):
            return shared
        blocks, first, writers = np.unique(current[shared], return_index=True, return_counts=True)
        # Where all that name a block are about to write it, the first keeps it.
        return np.delete(shared, first[writers == self.pool.refs[blocks]])

    def fork(self, source: int, target: int) -> None:
        """Lets row `target` share every block of row `source`."""
        self.pool = pools.share(self.pool, self.tables.fork(source, target))

    def free(self, row: int) -> None:
        """Releases all that a row names; published blocks stay findable until they are evicted."""
        self.pool = pools.release(self.pool, self.tables.clear(row))

    def take_evicted(self) -> None:
        """Takes what was evicted since the last call out of the index."""
        for ids in self._evicted:
            if len(ids):
                self.index.evict(ids)
        self._evicted.clear()

    def publish(
        self, row: int, tokens: np.ndarray, digests: Sequence[bytes], root: bytes, start: int, stop: int,
        extras: Extras = NO_EXTRAS,
    ) -> None:  # fmt: skip
        """Enters blocks [start, stop) of a row, whose writing steps were dispatched and whose tokens are known."""
        size = self.block_size
        for number in range(start, stop):
            parent = digests[number - 1] if number else root
            block = int(self.tables.blocks[row, number])
            known = tokens[number * size : (number + 1) * size]
            if self.index.insert(digests[number], parent, known, block, extras.get(number, b"")):
                self._entered.append(block)

    def withdraw(self, row: int, start: int) -> None:
        """Takes the blocks of a row from number `start` on out of the index: their content was found bad."""
        ids = self.tables.of(row)[start:]
        self.index.evict(ids)
        self.pool = pools.unpublish(self.pool, ids)

    def reset_index(self) -> None:
        """Forgets all that was published."""
        self.index.clear()
        self._evicted.clear()
        self.pool = pools.reset_published(self.pool)

    def check(self) -> None:
        """The invariants of the accounting.

        Raises:
            PoolInvariantError: one does not hold; the message carries the accounting.
        """
        tables = self.tables
        pools.check(self.pool, [tables.of(row) for row in np.flatnonzero(tables.counts).tolist()])
        self.take_evicted()
        self.index.check(self.pool)
