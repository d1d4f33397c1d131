"""Block tables of the running sequences, as NumPy arrays over groups and rows."""

from collections.abc import Sequence

import numpy as np

from jaxinfer.kv.groups import SINGLE, KindGroups, count, own
from jaxinfer.kv.pool import PoolInvariantError


class Tables:
    """Block tables and lengths of the sequences in the batch's rows.

    Positions `[0, lengths[r])` of row r have been written by steps dispatched so far. For kind k the row holds blocks
    `[firsts[k, r], counts[k, r])`, one id in each of the kind's groups; `firsts` is non-zero only where a window has
    moved on. Hence `lengths[r] <= counts[k, r] * block_size`.

    The device keeps a copy of `blocks`. Rows in `unsent` have entries the device does not know yet (`take_unsent`).
    Other changes only affect blocks that the next decode step writes, and each step carries those ids. Released entries
    stay in the device's copy, where they are not read.

    The last kind, if it stores encoder positions (`kv.cross_cache`), has the blocks of `read[r]` positions, whatever
    the row's length.
    """

    def __init__(self, rows: int, width: int, block_size: int, kinds: Sequence[KindGroups] = SINGLE):
        self.block_size = block_size
        self.kinds = tuple(kinds)
        self.blocks = np.full((count(kinds), rows, width), -1, np.int32)
        """Block ids `[G, R, W]` int32; -1 for no block."""
        self.firsts = np.zeros((len(kinds), rows), np.int32)
        self.counts = np.zeros((len(kinds), rows), np.int32)
        self.lengths = np.zeros(rows, np.int32)
        self.read = np.zeros(rows, np.int32)
        self.seen = np.zeros((rows, 2), np.int32)
        """Start and end `[R, 2]` of the encoder positions that the next tokens of each row see."""
        self.unsent: set[int] = set()
        self._own = count(own(kinds))
        """Number of groups that grow with the sequence; they come first."""
        self._sent = np.zeros((len(kinds), rows), np.int32)
        """Number of blocks of the rows in `unsent` that the device already knows."""

    @property
    def rows(self) -> int:
        """Rows of the batch, R."""
        return len(self.lengths)

    def used(self) -> list[int]:
        """Return the rows that hold blocks."""
        return np.flatnonzero(self.counts.any(axis=0)).tolist()

    def assign(self, row: int, ids: np.ndarray, length: int, read: int = 0, seen: tuple[int, int] = (0, 0)) -> None:
        """Give an empty row its first blocks.

        Args:
            row: the row.
            ids: block ids `[G, n]`; -1 where a group needs none. The needed ones are contiguous.
            length: positions already written.
            read: encoder positions.
            seen: start and end of the encoder positions that the row's new tokens see.
        """
        self.blocks[:, row, : ids.shape[1]] = ids
        for k, kind in enumerate(self.kinds):
            held = np.flatnonzero(ids[kind.first] >= 0)
            if len(held):
                self.firsts[k, row], self.counts[k, row] = held[0], held[-1] + 1
        self.lengths[row], self.read[row], self.seen[row] = length, read, seen
        self._sent[:, row] = 0
        self.unsent.add(row)

    def append(self, k: int, row: int, ids: np.ndarray) -> None:
        """Append blocks `[m, n]` of kind `k` to a row."""
        stop = self.counts[k, row] + ids.shape[1]
        self.blocks[self.kinds[k].span, row, self.counts[k, row] : stop] = ids
        if row not in self.unsent:
            self._sent[:, row] = self.counts[:, row]
            self.unsent.add(row)
        self.counts[k, row] = stop

    def append_all(self, rows: np.ndarray, added: Sequence[np.ndarray], ids: np.ndarray) -> None:
        """Append `added[k]` `[B]` blocks of each kind k that grows to rows `[B]`; `ids` are kind after kind."""
        start = 0
        for k, more in enumerate(added):
            n = self.kinds[k].count * int(more.sum())
            if n:
                self.append_to(k, rows, more, ids[start : start + n])
            start += n

    def append_to(self, k: int, rows: np.ndarray, added: np.ndarray, ids: np.ndarray) -> None:
        """Append `added[i]` blocks of kind `k` to each row, which the next decode step sends to the device.

        `ids` has one id per block and group of the kind, `[added.sum() * m]`.
        """
        kind, before = self.kinds[k], self.counts[k, rows]
        owners = np.repeat(rows, added)
        first = np.repeat(before - (np.cumsum(added) - added), added)
        columns = first + np.arange(len(owners))
        for group, some in enumerate(ids.reshape(-1, kind.count).T, kind.first):
            self.blocks[group, owners, columns] = some
        self.counts[k, rows] += added

    def replace(self, rows: np.ndarray, numbers: np.ndarray, places: np.ndarray, ids: np.ndarray) -> None:
        """Replace some of the blocks that `at(rows, numbers)` returns: those at `places` of its flat result."""
        groups, owners = np.divmod(places, len(rows))
        self.blocks[groups, rows[owners], numbers[owners]] = ids

    def fork(self, source: int, target: int) -> np.ndarray:
        """Replace the entries of row `target` with those of `source`; return the ids, to be shared in the pool."""
        for k, kind in enumerate(self.kinds):
            # The device already knows the leading blocks that both rows have in common.
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
        """Empty a row; return its ids, last block first, the order in which to release them."""
        ids = self.of(row)[::-1].copy()
        for array in (self.firsts.T, self.counts.T, self.lengths, self.read, self.seen):
            array[row] = 0
        self.blocks[:, row] = -1
        self.unsent.discard(row)
        return ids

    def at(self, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return the ids of block `numbers[b]` of each row, `[., B]` over the groups that grow; -1 for no block."""
        groups, _, width = self.blocks.shape
        return self.blocks.reshape(groups, -1)[: self._own].take(rows * width + numbers, axis=1)

    def of(self, row: int) -> np.ndarray:
        """Return the ids of a row, block by block, all groups of a block side by side."""
        ids = self.blocks[:, row, : self.counts[:, row].max()].T.ravel()
        return ids[ids >= 0]

    def check(self, num_blocks: int) -> None:
        """Check that each block belongs to one group and that rows hold the blocks their kinds need, without gaps.

        Raises:
            PoolInvariantError: a table violates this.
        """
        owners = np.full(num_blocks, -1)
        for group, blocks in enumerate(self.blocks):
            ids = blocks[blocks >= 0]
            if (owners[ids] >= 0).any():
                block = int(ids[owners[ids] >= 0][0])
                raise PoolInvariantError(f"block {block} is in the tables of groups {owners[block]} and {group}.")
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
                    f"{kind.kind.name}; recorded are [{firsts[row]}, {counts[row]}), needed from {needed[row]} on."
                )

    def send_from(self, rows: np.ndarray, numbers: np.ndarray) -> None:
        """Mark the entries of rows `[B]` from block `numbers` `[B]` on as not known to the device."""
        for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
            if row not in self.unsent:
                self._sent[:, row] = self.counts[:, row]
                self.unsent.add(row)
            self._sent[:, row] = np.minimum(self._sent[:, row], number)

    def resend(self, rows: Sequence[int]) -> None:
        """Mark all entries of these rows as not known to the device."""
        self._sent[:, rows] = 0
        self.unsent.update(rows)

    def take_unsent(self) -> np.ndarray:
        """Return the entries the device does not know yet, `[4, n]` int32: group, row, column, block id."""
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
