"""The host's view of the paged cache: the pool, the prefix index and the tables, changed together.

Every method either succeeds as a whole or changes nothing. What a step evicts is collected, and leaves the
index when the step is committed to (`take_evicted`); until then a hit on such a block is cut off here, as
the pool no longer calls it published.

Which blocks a sequence needs is up to the kinds of its layers (`kv.spec.Kind`): what lies before `first_needed` is
released, and a prefix is served by a kind where all from there to its end is kept.
"""

from collections.abc import Sequence

import numpy as np

from jaxinfer.kv import pool as pools
from jaxinfer.kv import prefix_match
from jaxinfer.kv.cross_cache import NOTHING_READ, Encoded, EncodedBlocks, EncodedHit
from jaxinfer.kv.groups import SINGLE, KindGroups, count, own
from jaxinfer.kv.pool import BlockPool, EvictFirst
from jaxinfer.kv.prefix import NO_EXTRAS, TOKEN_BYTES, Extras, PrefixIndex, as_bytes
from jaxinfer.kv.prefix_match import Hit
from jaxinfer.kv.recurrent import RecurrentStates
from jaxinfer.kv.spec import Recurrent
from jaxinfer.kv.tables import Tables


class BlockManager:
    """One pool of blocks, what is known of their contents, and who names them."""

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
        self.pool = BlockPool.create(num_blocks)
        self.kinds = own(kinds)
        """Those of the sequences' own positions."""
        self.index = PrefixIndex(block_size, kinds=len(kinds) + 1)
        self.tables = Tables(rows, width, block_size, kinds)
        self.encoded = EncodedBlocks(kinds, self.index, prefix_caching=prefix_caching)
        self.states: RecurrentStates | None = None
        """Where the states of recurrent layers are, if there are such."""
        if state_slots:
            self.states = RecurrentStates(state_slots, rows, self.index, num_blocks, keep=prefix_caching)
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.boundaries = np.zeros((2, rows), np.int32)
        """Ends of prefixes of each row's prompt that others may have too: where it parts from prompts before it, and
        all of it but its last token, in blocks. The windows before them stay findable."""
        self._groups, self._spans = count(kinds), [kind.span for kind in self.kinds]
        self._moving = [k for k, kind in enumerate(self.kinds) if not kind.kind.whole]
        """The kinds whose first needed position moves on."""
        self._cold = EvictFirst()
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
        """Logical blocks that hold this many positions."""
        return -(-tokens // self.block_size)

    def digests(
        self, tokens: np.ndarray, root: bytes, known: Sequence[bytes] = (), extras: Extras = NO_EXTRAS
    ) -> list[bytes]:
        """The chained digests of the full blocks of `tokens`; those already known are not computed again."""
        return self.index.chain(tokens, root, known, extras)

    def extend_digests(self, digests: list[bytes], tokens: np.ndarray, root: bytes, extras: Extras = NO_EXTRAS) -> None:
        """Adds those of the full blocks of `tokens` that are missing at the end of `digests`, in place."""
        self.index.extend(digests, tokens, root, extras)

    def lookup(self, tokens: np.ndarray, digests: Sequence[bytes], root: bytes, extras: Extras = NO_EXTRAS) -> Hit:
        """The longest usable prefix: at most floor((L - 1) / P) blocks, so that one token is left to compute."""
        if not self.prefix_caching:
            return prefix_match.nothing(self.kinds, "prefix caching is off")
        most = max(0, (len(tokens) - 1) // self.block_size)
        found = self.index.match(digests[:most], tokens, root, extras)
        kinds, published = self.kinds, self.pool.published
        if self.states is not None:
            kinds = *kinds, KindGroups(Recurrent(), count(kinds))
            published = np.concatenate([published, self.states.published])
        return prefix_match.longest(kinds, found, published, most, self.block_size)

    def lookup_encoded(self, content: Encoded | None) -> EncodedHit:
        """The blocks of what a sequence's encoder reads (None: nothing); all of them or none."""
        return self.encoded.lookup(content, self.pool.published)

    def admit(
        self, row: int, hit: Hit, tokens: int, reach: int | None = None, encoded: EncodedHit = NOTHING_READ
    ) -> bool:
        """Gives a row the blocks of its hits and new ones for the rest of `tokens` positions, or nothing at all.

        Of kinds that do not need all at the same time only those up to position `reach` are taken (`extend`).
        """
        own = hit.ids[: count(self.kinds)]
        shared = np.concatenate([own.T.ravel(), encoded.ids.T.ravel()])
        shared = shared[shared >= 0]
        pool = pools.share(self.pool, shared)
        ends, wanted = self._wanted(hit, tokens, reach)
        taken = self._allocate(pool, sum(wanted) + encoded.missing)
        if taken is None:
            return False
        self.pool, ids = taken
        self._cold.drop(shared)
        *own_ids, read = np.split(ids, np.cumsum(wanted))
        read = self.encoded.take(row, encoded, read)
        table = np.full((self._groups, max(hit.blocks, *ends, read.shape[1])), -1, np.int32)
        table[: len(own), : hit.blocks] = own
        for kind, end, some in zip(self.kinds, ends, own_ids, strict=True):
            table[kind.span, hit.blocks : end] = some.reshape(-1, kind.count).T
        table[len(own) :, : read.shape[1]] = read
        self.tables.assign(row, table, hit.blocks * self.block_size, encoded.length)
        self.boundaries[:, row] = hit.known, max(0, (tokens - 1) // self.block_size)
        if self.states is not None:
            snapshot = int(hit.ids[-1, -1]) if hit.blocks else None
            self.states.admit(row, snapshot, hit.blocks, self.boundaries[:, row].tolist())
        return True

    def needed(self, hit: Hit, tokens: int, reach: int | None = None, encoded: EncodedHit = NOTHING_READ) -> int:
        """Blocks that must be available for `admit` with the same arguments: new ones, and those of the hits that
        nobody holds."""
        shared = np.concatenate([hit.ids[: count(self.kinds)].ravel(), encoded.ids.ravel()])
        unheld = int(np.count_nonzero(self.pool.refs[shared[shared >= 0]] == 0))
        return sum(self._wanted(hit, tokens, reach)[1]) + encoded.missing + unheld

    def _wanted(self, hit: Hit, tokens: int, reach: int | None) -> tuple[list[int], list[int]]:
        """Where the blocks of each kind end after an admission, and how many of them are new."""
        reach = tokens if reach is None else reach
        ends = [self.blocks_for(tokens if kind.kind.whole else reach) for kind in self.kinds]
        return ends, [kind.count * (end - hit.blocks) for kind, end in zip(self.kinds, ends, strict=True)]

    def extend(self, row: int, start: int, stop: int) -> bool:
        """Before positions [start, stop) of a row's prompt are computed: releases what they do not need, and takes the
        blocks that were not taken at admission. Whether there were enough; if not, nothing has changed.
        """
        if not self._moving:
            return True
        tables, end = self.tables, self.blocks_for(stop)
        pool, behind = self._release_behind(self.pool, np.array([row]), np.array([start]))
        added = [max(0, end - int(tables.counts[k, row])) for k in self._moving]
        wanted = [self.kinds[k].count * n for k, n in zip(self._moving, added, strict=True)]
        taken = self._allocate(pool, sum(wanted))
        if taken is None:
            return False
        self.pool, ids = taken
        self._forget(behind)
        for k, n, some in zip(self._moving, added, np.split(ids, np.cumsum(wanted)[:-1]), strict=True):
            if n:
                tables.append(k, row, some.reshape(n, -1).T)
        return True

    def grow(self, rows: np.ndarray, steps: int = 1) -> tuple[np.ndarray, np.ndarray] | None:
        """Makes place for `steps` more positions in each row; None if the blocks do not suffice.

        Blocks behind a row's window are released. A row at the end of its blocks gets new ones. A row about to write
        blocks that others name as well gets copies (copy-on-write), but the last of them writes in place.

        Returns:
            Sources and targets of the block copies that must run before the rows write.
        """
        tables = self.tables
        lengths = tables.lengths[rows]
        pool, behind = self.pool, []
        if self._moving:
            pool, behind = self._release_behind(pool, rows, lengths)
        at = lengths // self.block_size
        last = (lengths + (steps - 1)) // self.block_size + 1
        added = [np.maximum(last - counts[rows], 0) for counts in tables.counts[: len(self.kinds)]]
        news = [kind.count * int(more.sum()) for kind, more in zip(self.kinds, added, strict=True)]
        # Of all groups that grow, one after another; -1 where a row has no such block yet.
        current = tables.at(rows, at).ravel()
        copied = self._must_copy(pool, current)
        new = sum(news)
        if not new and not len(copied):
            self.pool = pool
            self._forget(behind)
            return current[copied], current[copied]
        taken = self._allocate(pool, new + len(copied))
        if taken is None:
            return None
        pool, ids = taken
        self._forget(behind)
        start = 0
        for k, (more, n) in enumerate(zip(added, news, strict=True)):
            if n:
                self._append(k, rows, more, ids[start : start + n])
            start += n
        targets, sources = ids[new:], current[copied]
        if len(copied):
            groups, owners = np.divmod(copied, len(rows))
            tables.blocks[groups, rows[owners], at[owners]] = targets
            pool = pools.release(pool, sources)
        self.pool = pool
        return sources, targets

    def _append(self, k: int, rows: np.ndarray, added: np.ndarray, ids: np.ndarray) -> None:
        """Gives each row that many blocks of a kind, behind those it has; an id for each of the kind's groups."""
        tables, kind, before = self.tables, self.kinds[k], self.tables.counts[k, rows]
        owners = np.repeat(rows, added)
        first = np.repeat(before - (np.cumsum(added) - added), added)
        columns = first + np.arange(len(owners))
        for group, some in enumerate(ids.reshape(-1, kind.count).T, kind.first):
            tables.blocks[group, owners, columns] = some
        tables.counts[k, rows] += added

    def _must_copy(self, pool: BlockPool, current: np.ndarray) -> np.ndarray:
        """Which of the blocks `current` that rows write they may not write in place: their places in it."""
        shared = np.flatnonzero((current >= 0) & (pool.refs[current] > 1))
        if not len(shared):
            return shared
        blocks, first, writers = np.unique(current[shared], return_index=True, return_counts=True)
        # Where all that name a block are about to write it, the first keeps it.
        return np.delete(shared, first[writers == pool.refs[blocks]])

    def _release_behind(
        self, pool: BlockPool, rows: np.ndarray, starts: np.ndarray
    ) -> tuple[BlockPool, list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]]:
        """Releases what tokens from positions `starts` on no longer read.

        Returns:
            The pool, and what is to be forgotten in the tables if it is kept: kind, rows, columns, ids `[m, n]`.
        """
        tables, found = self.tables, []
        for k in self._moving:
            firsts = tables.firsts[k, rows]
            needed = self.kinds[k].kind.first_needed(starts) // self.block_size
            behind = np.maximum(np.minimum(needed, tables.counts[k, rows]) - firsts, 0)
            if not behind.any():
                continue
            owners = np.repeat(rows, behind)
            columns = np.repeat(firsts - (np.cumsum(behind) - behind), behind) + np.arange(len(owners))
            ids = tables.blocks[self.kinds[k].span, owners, columns]
            pool = pools.release(pool, ids.T.ravel())
            found.append((k, owners, columns, ids))
        return pool, found

    def _forget(self, behind: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Takes what was released behind windows out of the tables; what is cached of it is cold."""
        tables = self.tables
        for k, owners, columns, ids in behind:
            tables.blocks[self.kinds[k].span, owners, columns] = -1
            np.maximum.at(tables.firsts[k], owners, columns + 1)
            ends = self.boundaries[:, owners]
            starts = self.kinds[k].kind.first_block(ends, self.block_size)
            cold = ((columns >= ends) | (columns < starts)).all(axis=0)
            self._cold.add(ids[:, cold].T.ravel().tolist())

    def _allocate(self, pool: BlockPool, n: int) -> tuple[BlockPool, np.ndarray] | None:
        """Takes n blocks, cold ones before others that are cached; None if there are too few."""
        if n > pool.num_available:
            return None
        if self._cold and n > pool.num_free:
            chosen = self._cold.take(pool, n - int(pool.num_free))
            self._evicted.append(chosen)
            pool = pools.unpublish(pool, chosen)
        pool, ids, evicted, _ = pools.allocate(pool, n)
        self._evicted.append(evicted)
        self._cold.drop(ids)
        return pool, ids

    def fork(self, source: int, target: int) -> None:
        """Lets row `target` share every block of row `source`; what it had itself is released."""
        own = self.tables.of(target)[::-1].copy()
        pool = pools.share(self.pool, self.tables.fork(source, target))
        self.pool = pools.release(pool, own)
        self.boundaries[:, target] = self.boundaries[:, source]
        if self.states is not None:
            self.states.free(target)
            self.states.fork(source, target)

    def free(self, row: int, digests: Sequence[bytes] = ()) -> None:
        """Releases all that a row names; published blocks stay findable until they are evicted.

        Blocks are evicted from the end of a prefix to its start. With the row's `digests`, the windows before the ends
        of prefixes that others may have stay as long as what lies before those ends.
        """
        self.encoded.leave(row)
        if self.states is not None:
            self.states.free(row)
        ends = sorted(set(self.boundaries[:, row].tolist()), reverse=True) if self._moving and digests else []
        blocks = self.tables.blocks[:, row].copy() if ends else None
        ids = self.tables.clear(row)
        released: list[np.ndarray] = []
        for end in ends:
            count = int((blocks[:, end:] >= 0).sum())
            blocks[:, end:] = -1
            released.append(ids[:count])
            ids = ids[count:]
            if len(window := self._window_before(digests[:end])):
                self.pool = pools.touch(pools.release(self.pool, np.concatenate(released)), window)
                released = []
        self.pool = pools.release(self.pool, np.concatenate([*released, ids]))

    def _window_before(self, digests: Sequence[bytes]) -> np.ndarray:
        """Of the windows before the end of a prefix what nobody holds: from here on it is the last to be evicted."""
        ids: list[int] = []
        for k in self._moving:
            start = self.kinds[k].kind.first_block(len(digests), self.block_size)
            ids += [i for node in self.index.nodes(digests[start:]) for i in node.ids[k]]
        self._cold.drop(ids)
        window = np.array(ids, np.int32)
        return window[self.pool.slot[window] >= 0]

    def take_evicted(self) -> None:
        """Takes what was evicted since the last call out of the index, and with it what was published together."""
        ids = [some for some in self._evicted if len(some)]
        if self.states is not None:
            ids += self.states.take_evicted()
        if ids:
            self._unpublish(self.index.evict(np.concatenate(ids)))
        self._evicted.clear()

    def _unpublish(self, ids: list[int]) -> None:
        blocks = [i for i in ids if i < self._pool.num_blocks]
        if blocks:
            self.pool = pools.unpublish(self.pool, blocks)
        if self.states is not None:
            self.states.withdraw(ids)

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
        """Enters blocks [start, stop) of a row, whose writing steps were dispatched and whose tokens are known.

        Kinds whose window has moved on meanwhile have none to enter.
        """
        if start < stop and self._moving:
            self._make_nodes(tokens, digests, root, start, extras)
        width = self.block_size * TOKEN_BYTES
        data = as_bytes(tokens[start * self.block_size : stop * self.block_size])
        columns = self.tables.blocks[:, row, start:stop].T.tolist()
        for number, blocks in enumerate(columns, start):
            parent, extra = digests[number - 1] if number else root, extras.get(number, b"")
            known = data[(number - start) * width : (number - start + 1) * width]
            for k, span in enumerate(self._spans):
                ids = blocks[span]
                if ids[0] >= 0 and self.index.insert(digests[number], parent, known, ids, k, extra):
                    self._entered += ids
        if self.states is not None:
            self.states.publish(row, tokens, digests, root, stop, extras)

    def publish_encoded(self, row: int) -> None:
        """Enters the blocks of what a row's encoder read, once the step that fills them is dispatched."""
        self._entered += self.encoded.publish(row)

    def _make_nodes(self, tokens: np.ndarray, digests: Sequence[bytes], root: bytes, stop: int, extras: Extras) -> None:
        """The nodes of blocks [0, stop), of which those may be gone whose blocks are."""
        start, size = stop, self.block_size
        while start and digests[start - 1] not in self.index:
            start -= 1
        for number in range(start, stop):
            known, parent = tokens[number * size : (number + 1) * size], digests[number - 1] if number else root
            self.index.insert(digests[number], parent, known, extra=extras.get(number, b""))

    def withdraw(self, digests: Sequence[bytes]) -> None:
        """Takes the blocks of these digests out of the index: their content was found bad."""
        self._unpublish(self.index.withdraw(digests))

    def reset_index(self) -> None:
        """Forgets all that was published."""
        self.index.clear()
        self._evicted.clear()
        self._cold.clear()
        self.pool = pools.reset_published(self.pool)
        if self.states is not None:
            self.states.reset_published()

    def check(self) -> None:
        """The invariants of the accounting.

        Raises:
            PoolInvariantError: one does not hold; the message carries the accounting.
        """
        tables = self.tables
        pools.check(self.pool, [tables.of(row) for row in tables.used()])
        self.take_evicted()
        self.index.check(self.pool, [] if self.states is None else self.states.check())
        tables.check(self.pool.num_blocks)
