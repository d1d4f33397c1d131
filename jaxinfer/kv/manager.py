"""Host-side manager of the paged cache: updates the block pool, the prefix index and the block tables together.

Each method either succeeds as a whole or changes nothing. The kind of a layer (`kv.spec.Kind`) decides which blocks a
sequence needs: blocks before `first_needed` are released, and a kind can serve a prefix if all its blocks from there to
the prefix's end are cached.
"""

from collections.abc import Sequence

import numpy as np

from jaxinfer.kv import pool as pools
from jaxinfer.kv import pool_check
from jaxinfer.kv.cross_cache import NO_ENCODER_INPUT, EncodedHit
from jaxinfer.kv.digests import NO_EXTRAS, TOKEN_BYTES, Extras, as_bytes
from jaxinfer.kv.groups import SINGLE, KindGroups, count
from jaxinfer.kv.pool import BlockPool
from jaxinfer.kv.prefix_cache import PrefixCache
from jaxinfer.kv.prefix_match import Hit
from jaxinfer.kv.tables import Tables
from jaxinfer.kv.windows import Windows
from jaxinfer.kv.written import WrittenPositions


class BlockManager(PrefixCache, WrittenPositions):
    """Block tables of a paged cache over its prefix cache.

    Args:
        num_blocks: N.
        rows: rows of the batch, R.
        width: blocks in a row's table, W.
        block_size: P.
        prefix_caching: whether blocks are kept and shared between requests.
        kinds: groups of the model's layers.
        state_slots: slots for recurrent state; 0 for models without recurrent layers.
    """

    def __init__(
        self,
        num_blocks: int,
        rows: int,
        width: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        kinds: Sequence[KindGroups] = SINGLE,
        state_slots: int = 0,
    ):
        super().__init__(
            num_blocks, rows, block_size, prefix_caching=prefix_caching, kinds=kinds, state_slots=state_slots
        )
        self.tables = Tables(rows, width, block_size, kinds)
        self.boundaries = np.zeros((2, rows), np.int32)
        """Two prefix ends `[2, rows]` of each row's prompt, in blocks, that other prompts are likely to share: where it
        diverges from earlier prompts, and all but its last token. The windows before these ends are kept in the prefix
        cache."""
        self._groups, self._spans = count(kinds), [kind.span for kind in self.kinds]
        self._windows = Windows(self.tables, len(self.kinds), self.boundaries, self.evict_first)

    def blocks_of(self, row: int) -> np.ndarray:
        """Return the ids of all blocks that a row holds, in every group."""
        return self.tables.of(row)

    def cached_blocks(self) -> np.ndarray:
        """Return the ids of the blocks that no row holds and that keep a prefix, in any order. Costs O(N)."""
        pool = self.pool
        return np.flatnonzero(pool.published & (pool.refs == 0))

    def blocks_for(self, tokens: int) -> int:
        """Return the logical blocks that hold this many positions."""
        return -(-tokens // self.block_size)

    def admit(
        self,
        row: int,
        hit: Hit,
        tokens: int,
        chunk_end: int | None = None,
        encoded: EncodedHit = NO_ENCODER_INPUT,
        seen: tuple[int, int] = (0, 0),
    ) -> bool:
        """Give a row the blocks of its hits and new blocks for the rest of `tokens` positions, or nothing at all.

        Kinds that are filled chunk by chunk get blocks up to position `chunk_end` only; `extend` takes the rest.

        Args:
            row: an empty row.
            hit: the prefix hit.
            tokens: positions of the sequence.
            chunk_end: positions to allocate for now; None for all.
            encoded: the encoder input's hit.
            seen: start and end of the encoder positions that the sequence's new tokens see.

        Returns:
            Whether there were enough blocks.
        """
        own = hit.ids[: count(self.kinds)]
        shared = np.concatenate([own.T.ravel(), encoded.ids.T.ravel()])
        shared = shared[shared >= 0]
        pool = pools.share(pools.begin(self.pool), shared)
        ends, wanted = self._wanted(hit, tokens, chunk_end)
        taken = self._allocate(pool, sum(wanted) + encoded.missing)
        if taken is None:
            self.pool = pools.rollback(pool)
            return False
        pool, ids = taken
        self.pool = pools.commit(pool)
        self.evict_first.drop(shared)
        *own_ids, read = np.split(ids, np.cumsum(wanted))
        read = self.encoded.take(row, encoded, read)
        table = np.full((self._groups, max(hit.blocks, *ends, read.shape[1])), -1, np.int32)
        table[: len(own), : hit.blocks] = own
        for kind, end, some in zip(self.kinds, ends, own_ids, strict=True):
            table[kind.span, hit.blocks : end] = some.reshape(-1, kind.count).T
        table[len(own) :, : read.shape[1]] = read
        self.tables.assign(row, table, hit.blocks * self.block_size, encoded.length, seen)
        self.boundaries[:, row] = hit.known, max(0, (tokens - 1) // self.block_size)
        if self.states is not None:
            snapshot = int(hit.ids[-1, -1]) if hit.blocks else None
            self.states.admit(row, snapshot, hit.blocks, self.boundaries[:, row].tolist())
        return True

    def needed(
        self, hit: Hit, tokens: int, chunk_end: int | None = None, encoded: EncodedHit = NO_ENCODER_INPUT
    ) -> int:
        """Return the available blocks that `admit` with the same arguments needs.

        Counts new blocks, and hit blocks that no sequence holds.
        """
        shared = np.concatenate([hit.ids[: count(self.kinds)].ravel(), encoded.ids.ravel()])
        unheld = int(np.count_nonzero(self.pool.refs[shared[shared >= 0]] == 0))
        return sum(self._wanted(hit, tokens, chunk_end)[1]) + encoded.missing + unheld

    def _wanted(self, hit: Hit, tokens: int, chunk_end: int | None) -> tuple[list[int], list[int]]:
        """Return the end of each kind's blocks after an admission, and the new block ids of each kind."""
        chunk_end = tokens if chunk_end is None else chunk_end
        ends = [self.blocks_for(tokens if kind.kind.keeps_all else chunk_end) for kind in self.kinds]
        return ends, [kind.count * (end - hit.blocks) for kind, end in zip(self.kinds, ends, strict=True)]

    def extend(self, row: int, start: int, stop: int) -> bool:
        """Prepare a row for computing positions [start, stop) of its prompt.

        Releases blocks these positions no longer read, and allocates those not allocated at admission.

        Returns:
            Whether there were enough blocks; if not, nothing has changed.
        """
        if not self._windows.numbers:
            return True
        tables, end = self.tables, self.blocks_for(stop)
        pool, passed = self._windows.release(pools.begin(self.pool), np.array([row]), np.array([start]))
        added = [max(0, end - int(tables.counts[k, row])) for k in self._windows.numbers]
        wanted = [self.kinds[k].count * n for k, n in zip(self._windows.numbers, added, strict=True)]
        taken = self._allocate(pool, sum(wanted))
        if taken is None:
            self.pool = pools.rollback(pool)
            return False
        pool, ids = taken
        self.pool = pools.commit(pool)
        self._windows.clear(passed)
        for k, n, some in zip(self._windows.numbers, added, np.split(ids, np.cumsum(wanted)[:-1]), strict=True):
            if n:
                tables.append(k, row, some.reshape(n, -1).T)
        return True

    def grow(self, rows: np.ndarray, steps: int = 1) -> tuple[np.ndarray, np.ndarray] | None:
        """Make room for `steps` more positions in each row.

        Releases blocks behind a row's window and allocates new ones at its end. Blocks about to be written that other
        rows share are copied (copy-on-write), except by the last holder, which writes in place.

        Args:
            rows: rows that write, `[B]`.
            steps: decode steps.

        Returns:
            Source and target block ids of the copies that must run before the rows write, or None if there are too few
            blocks.
        """
        tables = self.tables
        lengths = tables.lengths[rows]
        pool, passed = pools.begin(self.pool), []
        if self._windows.numbers:
            pool, passed = self._windows.release(pool, rows, lengths)
        at = lengths // self.block_size
        added, new = self._added(rows, lengths, steps)
        # The blocks to be written, group after group; -1 where a row has no block there yet.
        current = tables.at(rows, at).ravel()
        copied = self._must_copy(pool, current)
        if not new and not len(copied):
            self.pool = pools.commit(pool)
            self._windows.clear(passed)
            return current[copied], current[copied]
        taken = self._allocate(pool, new + len(copied))
        if taken is None:
            self.pool = pools.rollback(pool)
            return None
        pool, ids = taken
        self._windows.clear(passed)
        tables.append_all(rows, added, ids[:new])
        targets, sources = ids[new:], current[copied]
        if len(copied):
            tables.replace(rows, at, copied, targets)
            pool = pools.release(pool, sources)
        self.pool = pools.commit(pool)
        return sources, targets

    def _added(self, rows: np.ndarray, lengths: np.ndarray, steps: int) -> tuple[list[np.ndarray], int]:
        """Return for each kind the blocks `[B]` that the rows need for `steps` more positions, and the ids of all."""
        last = (lengths + (steps - 1)) // self.block_size + 1
        added = [np.maximum(last - counts[rows], 0) for counts in self.tables.counts[: len(self.kinds)]]
        return added, sum(kind.count * int(more.sum()) for kind, more in zip(self.kinds, added, strict=True))

    def _must_copy(self, pool: BlockPool, current: np.ndarray) -> np.ndarray:
        """Return the indices into `current` of blocks that must be copied before rows write them."""
        shared = np.flatnonzero((current >= 0) & (pool.refs[current] > 1))
        if not len(shared):
            return shared
        blocks, first, writers = np.unique(current[shared], return_index=True, return_counts=True)
        # If every holder of a block is about to write it, the first one writes in place.
        return np.delete(shared, first[writers == pool.refs[blocks]])

    def fork(self, source: int, target: int) -> None:
        """Make row `target` share every block of row `source`; releases the target's own blocks."""
        own = self.tables.of(target)[::-1].copy()
        pool = pools.share(self.pool, self.tables.fork(source, target))
        self.pool = pools.release(pool, own)
        self.boundaries[:, target] = self.boundaries[:, source]
        if self.states is not None:
            self.states.free(target)
            self.states.fork(source, target)

    def free(self, row: int, digests: Sequence[bytes] = ()) -> None:
        """Release all blocks of a row; published blocks stay cached until evicted.

        Blocks are evicted from the end of a prefix to its start. With the row's `digests`, the windows before its
        shared prefix ends (`boundaries`) stay as long as the blocks before those ends.
        """
        self.encoded.leave(row)
        if self.states is not None:
            self.states.free(row)
        ends = sorted(set(self.boundaries[:, row].tolist()), reverse=True) if self._windows.numbers and digests else []
        blocks = self.tables.blocks[:, row].copy() if ends else None
        ids = self.tables.clear(row)
        released: list[np.ndarray] = []
        for end in ends:
            count = int((blocks[:, end:] >= 0).sum())
            blocks[:, end:] = -1
            released.append(ids[:count])
            ids = ids[count:]
            if len(window := self._windows.cached_before(self.pool, self.index, digests[:end])):
                self.pool = pools.touch(pools.release(self.pool, np.concatenate(released)), window)
                released = []
        self.pool = pools.release(self.pool, np.concatenate([*released, ids]))

    def resend(self, rows: Sequence[int]) -> None:
        """Send the block tables of these rows to the device again, as a step that sent them was dropped."""
        self.tables.resend(rows)

    def publish(
        self,
        row: int,
        tokens: np.ndarray,
        digests: Sequence[bytes],
        root: bytes,
        start: int,
        stop: int,
        extras: Extras = NO_EXTRAS,
    ) -> None:
        """Enter blocks [start, stop) of a row in the prefix index.

        The steps that write the blocks must be dispatched and their tokens known. Kinds whose window has moved past a
        block enter none for it.

        Args:
            row: the row.
            tokens: its known tokens, `[T]`.
            digests: chained digests of their full blocks.
            root: parent digest of the first block.
            start: first block.
            stop: end of the blocks.
            extras: extra content of blocks, by block number.
        """
        if start < stop and self._windows.numbers:
            self.index.insert_missing(tokens, digests, root, start, extras)
        width = self.block_size * TOKEN_BYTES
        data = as_bytes(tokens[start * self.block_size : stop * self.block_size])
        columns = self.tables.blocks[:, row, start:stop].T.tolist()
        for number, blocks in enumerate(columns, start):
            parent, extra = digests[number - 1] if number else root, extras.get(number, b"")
            known = data[(number - start) * width : (number - start + 1) * width]
            for k, span in enumerate(self._spans):
                ids = blocks[span]
                if ids[0] >= 0 and self.index.insert(digests[number], parent, known, ids, k, extra):
                    self._newly_published += ids
        if self.states is not None:
            self.states.publish(row, tokens, digests, root, stop, extras)

    def publish_encoded(self, row: int) -> None:
        """Enter the blocks of a row's encoder input in the index; the step that fills them must be dispatched."""
        self._newly_published += self.encoded.publish(row)

    def check(self) -> None:
        """Check the invariants of pool, index, tables and states.

        Raises:
            PoolInvariantError: an invariant is violated; the message carries the accounting.
        """
        tables = self.tables
        pool_check.check(self.pool, [tables.of(row) for row in tables.used()])
        self.take_evicted()
        self.index.check(self.pool, [] if self.states is None else self.states.check())
        tables.check(self.pool.num_blocks)
