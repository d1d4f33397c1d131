"""Release and eviction of blocks that windows, sliding ones and chunks, have moved past."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxinfer.kv import pool as pools
from jaxinfer.kv.eviction import EvictFirst
from jaxinfer.kv.pool import BlockPool
from jaxinfer.kv.prefix import PrefixIndex
from jaxinfer.kv.tables import Tables


class Passed(NamedTuple):
    """Table entries of one kind that a window has moved past."""

    kind: int
    rows: np.ndarray
    """Row of each block, `[n]`."""
    columns: np.ndarray
    """Number of each block in its sequence, `[n]`."""
    ids: np.ndarray
    """Block ids in the kind's groups, `[m, n]`."""


class Windows:
    """Kinds of layers that need only the last positions of a sequence.

    Args:
        tables: block tables of the rows.
        kinds: number of kinds that store the sequences' own positions; they are the first ones of the tables.
        boundaries: two prefix ends `[2, rows]` of each row's prompt, in blocks, that other prompts are likely to share.
        evict_first: takes the blocks that no other prompt is likely to hit.
    """

    def __init__(self, tables: Tables, kinds: int, boundaries: np.ndarray, evict_first: EvictFirst):
        self.tables, self.boundaries = tables, boundaries
        self.numbers = [k for k, kind in enumerate(tables.kinds[:kinds]) if not kind.kind.keeps_all]
        """Indices of kinds whose first needed position advances with the sequence."""
        self._evict_first = evict_first

    def release(self, pool: BlockPool, rows: np.ndarray, starts: np.ndarray) -> tuple[BlockPool, list[Passed]]:
        """Release blocks that tokens from positions `starts` on no longer read.

        Returns:
            The pool, and the table entries to `clear` if that pool is kept.
        """
        tables, found = self.tables, []
        for k in self.numbers:
            firsts, kind = tables.firsts[k, rows], tables.kinds[k]
            needed = kind.kind.first_needed(starts) // tables.block_size
            behind = np.maximum(np.minimum(needed, tables.counts[k, rows]) - firsts, 0)
            if not behind.any():
                continue
            owners = np.repeat(rows, behind)
            columns = np.repeat(firsts - (np.cumsum(behind) - behind), behind) + np.arange(len(owners))
            ids = tables.blocks[kind.span, owners, columns]
            pool = pools.release(pool, ids.T.ravel())
            found.append(Passed(k, owners, columns, ids))
        return pool, found

    def clear(self, passed: Sequence[Passed]) -> None:
        """Clear the table entries of released blocks.

        Blocks that are in no window before a shared prefix end are evicted first: no other prompt is likely to hit
        them.
        """
        tables = self.tables
        for k, owners, columns, ids in passed:
            kind = tables.kinds[k]
            tables.blocks[kind.span, owners, columns] = -1
            np.maximum.at(tables.firsts[k], owners, columns + 1)
            ends = self.boundaries[:, owners]
            starts = kind.kind.first_block(ends, tables.block_size)
            unshared = ((columns >= ends) | (columns < starts)).all(axis=0)
            self._evict_first.add(ids[:, unshared].T.ravel().tolist())

    def cached_before(self, pool: BlockPool, index: PrefixIndex, digests: Sequence[bytes]) -> np.ndarray:
        """Return the cached blocks of the windows before a prefix's end; no longer evict them first."""
        ids: list[int] = []
        for k in self.numbers:
            start = self.tables.kinds[k].kind.first_block(len(digests), self.tables.block_size)
            ids += [i for node in index.nodes(digests[start:]) for i in node.ids[k]]
        self._evict_first.drop(ids)
        window = np.array(ids, np.int32)
        return window[pools.is_cached(pool, window)]
