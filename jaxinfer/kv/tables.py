"""Block tables of the running sequences, as NumPy arrays over groups and rows."""

from collections.abc import Sequence

import numpy as np

from jaxinfer.kv.groups import SINGLE, KindGroups, count, own
from jaxinfer.kv.pool import PoolInvariantError


class Tables:
    """Row `r`: the blocks of the sequence that runs there, and how many positions it has written.

    `[0, lengths[r])` are the positions whose keys and values are written by steps dispatched so far. Of kind k the
    sequence holds the blocks numbered `[firsts[k, r], counts[k, r])`, in each of the kind's groups one; `firsts` is 0
    but where a window has moved on. So `lengths[r] <= counts[k, r] * block_size`.

    The device keeps a copy of `blocks`. Rows in `unsent` have blocks that are new to it (`take_unsent`). Where a
    row changes otherwise, it changes in the blocks that the next decode step writes: each step says which those are.
    What was released stays in the device's copy, where nobody reads it.

    Of a kind that keeps what an encoder read (`kv.encoded`), the last one, a row holds the blocks of `read[r]`
    positions, whatever its own length is.
    """

    def __init__(self, rows: int, width: int, block_size: int, kinds: Sequence[KindGroups] = SINGLE):
        self.block_size = block_size
        self.kinds = tuple(kinds)
        self.blocks = np.full((count(kinds), rows, width), -1, np.int32)
        """`[G, R, W]`; -1 where there is none."""
        self.firsts = np.zeros((len(kinds), rows), np.int32)
        self.counts = np.zeros((len(kinds), rows), np.int32)
        self.lengths = np.zeros(rows, np.int32)
        self.read = np.zeros(rows, np.int32)
        self.seen = np.zeros((rows, 2), np.int32)
        """The first and the end of the encoder positions that the next tokens of each row see."""
        self.unsent: set[int] = set()
        self._own = count(own(kinds))
        """Groups that grow with the sequence: the first ones."""
        self._sent = np.zeros((len(kinds), rows), np.int32)
        """Blocks of the rows in `unsent` that the device knows."""

    @property
    def rows(self) -> int:
        """R."""
        return len(self.lengths)

    def used(self) -> list[int]:
        """The rows that hold blocks."""
        return np.flatnonzero(self.counts.any(axis=0)).tolist()

    def assign(self, row: int, ids: np.ndarray, length: int, read: int = 0) -> None:
        """Gives an empty row its first blocks `[G, n]`, of which the first `length` positions are written.

        -1 where a group needs none; those it needs lie together. `read`: positions of what its encoder reads.
        """
        self.blocks[:, row, : ids.shape[1]] = ids
        for k, kind in enumerate(self.kinds):
            held = np.flatnonzero(ids[kind.first] >= 0)
            if len(held):
                self.firsts[k, row], self.counts[k, row] = held[0], held[-1] + 1
        self.lengths[row], self.read[row] = length, read
        self._sent[:, row] = 0
        self.unsent.add(row)

    def append(self, k: int, row: int, ids: np.ndarray) -> None:
        """Gives a row more blocks `[m, n]` of one kind, behind those it has."""
        stop = self.counts[k, row] + ids.shape[1]
        self.blocks[self.kinds[k].span, row, self.counts[k, row] : stop] = ids
        if row not in self.unsent:
            self._sent[:, row] = self.counts[:, row]
            self.unsent.add(row)
        self.counts[k, row] = stop

    def fork(self, source: int, target: int) -> np.ndarray:
        """Lets row `target` name all that `source` names, and no more what it named; the ids, to be shared in the
        pool."""
        for k, kind in enumerate(self.kinds):
            # What both have at their beginning the device knows.
            same = (self.blocks[kind.span, source] == self.blocks[kind.span, target]).all(axis=0)
            sent = self._sent[k, target] if target in self.unsent else self.counts[k, target]
            self._sent[k, target] = min(int(np.argmin(np.append(same, False))), sent)
        for array in (self.firsts, self.counts):
            array[:, target] = array[:, source]
        self.blocks[:, target] = self.blocks[:, source]
        for array in (self.lengths, self.read, self.seen):
            array[target] = array[source]
        self.unsent.add(target)
        return self.of(target)

    def clear(self, row: int) -> np.ndarray:
        """Empties a row; its ids, last block first, as they are to be released."""
        ids = self.of(row)[::-1].copy()
        for array in (self.firsts.T, self.counts.T, self.lengths, self.read, self.seen):
            array[row] = 0
        self.blocks[:, row] = -1
        self.unsent.discard(row)
        return ids

    def at(self, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """The ids of one block of each row, `[., B]` over the groups that grow; -1 where it has none."""
        groups, _, width = self.blocks.shape
        return self.blocks.reshape(groups, -1)[: self._own].take(rows * width + numbers, axis=1)

    def of(self, row: int) -> np.ndarray:
        """The ids of one row, block by block: those of all groups beside each other."""
        ids = self.blocks[:, row, : self.counts[:, row].max()].T.ravel()
        return ids[ids >= 0]

    def check(self, num_blocks: int) -> None:
        """A block is of one group; a row holds what its kinds need, without a gap.

        Raises:
            PoolInvariantError: one does not hold.
        """
        owners = np.full(num_blocks, -1)
        for group, blocks in enumerate(self.blocks):
            ids = blocks[blocks >= 0]
            if (owners[ids] >= 0).any():
                block = int(ids[owners[ids] >= 0][0])
                raise PoolInvariantError(f"block {block} is named by groups {owners[block]} and {group}.")
            owners[ids] = group
        columns = np.arange(self.blocks.shape[2])
        for kind, firsts, counts in zip(self.kinds, self.firsts, self.counts, strict=True):
            lengths = self.read if kind.kind.encoded else self.lengths
            held = (columns >= firsts[:, None]) & (columns < counts[:, None])
            needed = np.minimum(kind.kind.first_needed(lengths) // self.block_size, counts)
            wrong = ((self.blocks[kind.span] >= 0) != held).any(axis=(0, 2))
            wrong |= (firsts > needed) | (lengths > counts * self.block_size)
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                raise PoolInvariantError(
                    f"row {row} of {lengths[row]} positions holds blocks {self.blocks[kind.span, row].tolist()} of "
                    f"{kind.kind.name}, said to be those from {firsts[row]} to before {counts[row]}; it needs those "
                    "from "
                    f"{needed[row]} on."
                )

    def take_unsent(self) -> np.ndarray:
        """`[4, n]` int32: group, row, column and block id of every entry that the device does not know yet."""
        if not self.unsent:
            return np.empty((4, 0), np.int32)
        rows = np.array(sorted(self.unsent), np.int32)
        self.unsent.clear()
        parts = []
        for k, kind in enumerate(self.kinds):
            starts = np.maximum(self._sent[k, rows], self.firsts[k, rows])
            added = np.maximum(self.counts[k, rows] - starts, 0)
            owners = np.repeat(rows, added)
            columns = np.arange(len(owners), dtype=np.int32) - np.repeat(np.cumsum(added) - added - starts, added)
            for group in range(kind.first, kind.first + kind.count):
                parts.append([np.full(len(owners), group), owners, columns, self.blocks[group, owners, columns]])
        return np.concatenate([np.stack(part) for part in parts], axis=1).astype(np.int32)
