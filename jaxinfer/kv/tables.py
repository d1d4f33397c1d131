"""Block tables of the running sequences, as NumPy arrays over their rows."""

import numpy as np


class Tables:
    """Row `r`: the blocks of the sequence that runs there, and how many positions it has written.

    `[0, lengths[r])` are the positions whose keys and values are written by steps dispatched so far; they lie in
    blocks `[0, counts[r])`, so that `lengths[r] <= counts[r] * block_size`.

    The device keeps a copy of `blocks`. Rows in `unsent` are new to it and are sent whole (`take_unsent`). Where a
    row changes afterwards, it changes in the block that the next decode step writes: each step says which that is.
    """

    def __init__(self, rows: int, width: int, block_size: int):
        self.block_size = block_size
        self.blocks = np.full((rows, width), -1, np.int32)
        self.counts = np.zeros(rows, np.int32)
        self.lengths = np.zeros(rows, np.int32)
        self.unsent: set[int] = set()

    @property
    def rows(self) -> int:
        """R."""
        return len(self.counts)

    def assign(self, row: int, ids: np.ndarray, length: int) -> None:
        """Gives an empty row its blocks, of which the first `length` positions are written."""
        self.blocks[row, : len(ids)] = ids
        self.counts[row], self.lengths[row] = len(ids), length
        self.unsent.add(row)

    def fork(self, source: int, target: int) -> np.ndarray:
        """Lets row `target` name all that `source` names; the ids, to be shared in the pool."""
        ids = self.of(source)
        self.assign(target, ids, int(self.lengths[source]))
        return ids

    def clear(self, row: int) -> np.ndarray:
        """Empties a row; its ids, last block first, as they are to be released."""
        ids = self.of(row)[::-1].copy()
        self.blocks[row, : len(ids)], self.counts[row], self.lengths[row] = -1, 0, 0
        self.unsent.discard(row)
        return ids

    def of(self, row: int) -> np.ndarray:
        """The ids of one row."""
        return self.blocks[row, : self.counts[row]]

    def take_unsent(self) -> np.ndarray:
        """`[3, n]` int32: row, column and block id of every entry of the rows the device does not know yet."""
        if not self.unsent:
            return np.empty((3, 0), np.int32)
        rows = np.array(sorted(self.unsent), np.int32)
        self.unsent.clear()
        counts = self.counts[rows]
        owners = np.repeat(rows, counts)
        columns = np.arange(len(owners), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.stack([owners, columns, self.blocks[owners, columns]]).astype(np.int32)
