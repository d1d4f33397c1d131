"""Block tables of the running sequences, as NumPy arrays over their rows."""

import numpy as np


class Tables:
    """Row `r`: the blocks of the sequence that runs there, and how many positions it has written.

    `[0, lengths[r])` are the positions whose keys and values are written by steps dispatched so far; they lie in
    blocks `[0, counts[r])`, so that `lengths[r] <= counts[r] * block_size`.
    """

    def __init__(self, rows: int, width: int, block_size: int):
        self.block_size = block_size
        self.blocks = np.full((rows, width), -1, np.int32)
        self.counts = np.zeros(rows, np.int32)
        self.lengths = np.zeros(rows, np.int32)

    @property
    def rows(self) -> int:
        """R."""
        return len(self.counts)

    def assign(self, row: int, ids: np.ndarray, length: int) -> None:
        """Gives an empty row its blocks, of which the first `length` positions are written."""
        self.blocks[row, : len(ids)] = ids
        self.counts[row], self.lengths[row] = len(ids), length

    def fork(self, source: int, target: int) -> np.ndarray:
        """Lets row `target` name all that `source` names; the ids, to be shared in the pool."""
        ids = self.of(source)
        self.assign(target, ids, int(self.lengths[source]))
        return ids

    def clear(self, row: int) -> np.ndarray:
        """Empties a row; its ids, last block first, as they are to be released."""
        ids = self.of(row)[::-1].copy()
        self.blocks[row], self.counts[row], self.lengths[row] = -1, 0, 0
        return ids

    def of(self, row: int) -> np.ndarray:
        """The ids of one row."""
        return self.blocks[row, : self.counts[row]]
