"""Where the draft model's cache holds keys and values of a sequence.

The draft model writes the blocks of the served model, but at other times: it computes what it lacks when it drafts. So
each block has a mark of what the draft model has written there. The mark of a full block is the digest of the prefix
that ends with it, which any sequence with this prefix can use, and of other blocks a number of the sequence that wrote
it last. Blocks that were evicted, copied or allocated anew since need no care: their marks are those of other tokens.
"""

import itertools
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from jaxinfer.engine.request import Sequence
from jaxinfer.kv.groups import full_group
from jaxinfer.kv.tables import Tables


@dataclass
class _Row:
    """What the draft model has written for the sequence of a row."""

    mark: int
    """Mark of the blocks that are not full."""
    known: int = 0
    """Number of leading positions with keys and values."""
    settled: int = 0
    """Number of leading blocks that have the marks of their digests."""
    draft: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """Tokens that follow the known positions, as drafted, with keys and values: those that turn out right are known."""


class DraftKeys:
    """Keys and values of running sequences in the draft model's cache of `blocks` blocks."""

    def __init__(self, tables: Tables, blocks: int):
        self._tables, self._group = tables, full_group(tables.kinds)
        self._marks = np.zeros(blocks, np.int64)
        """Mark of each block; 0 for none."""
        self._rows: dict[int, _Row] = {}
        self._numbers = itertools.count(1)

    def table(self, row: int) -> np.ndarray:
        """Return the blocks of a row that the draft model writes, `[W]`; -1 for no block."""
        return self._tables.blocks[self._group, row]

    def known(self, sequence: Sequence) -> int:
        """Return the number of a running sequence's leading tokens whose keys and values are there, but not the last's.

        The last token is the one to draft after, whose keys and values that step computes.
        """
        own = self._rows.get(sequence.row)
        if own is None:
            own = self._rows[sequence.row] = self._found(sequence)
        if len(own.draft):
            made = sequence.tokens[own.known : min(sequence.length, own.known + len(own.draft))]
            wrong = np.append(own.draft[: len(made)] != made, True)
            own.known += int(np.argmax(wrong))
            own.draft = own.draft[:0]
        own.known = min(own.known, sequence.length - 1)
        self._settle(sequence, own)
        return own.known

    def wrote(self, sequence: Sequence, start: int, stop: int, draft: np.ndarray) -> None:
        """Record that positions [start, stop) of known tokens were written, and after them those of drafted tokens."""
        own, size = self._rows[sequence.row], self._tables.block_size
        self._marks[self.table(sequence.row)[start // size : -(-(stop + len(draft)) // size)]] = own.mark
        own.known, own.draft = stop, draft

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence that is about to lose its row; its full blocks stay known by their digests."""
        if sequence.row in self._rows:
            self.known(sequence)
            del self._rows[sequence.row]

    def _found(self, sequence: Sequence) -> _Row:
        """Look up what is there for a sequence that has a new row."""
        digests = _numbers(sequence.digests)
        ids = self.table(sequence.row)[: len(digests)]
        there = (ids >= 0) & (self._marks[ids] == digests[: len(ids)])
        blocks = int(np.argmin(np.append(there, False)))
        return _Row(next(self._numbers), blocks * self._tables.block_size, blocks)

    def _settle(self, sequence: Sequence, own: _Row) -> None:
        """Give full blocks the marks of their digests."""
        full = min(own.known // self._tables.block_size, len(sequence.digests))
        if full > own.settled:
            some = slice(own.settled, full)
            self._marks[self.table(sequence.row)[some]] = _numbers(sequence.digests[some])
            own.settled = full


def _numbers(digests: Items[bytes]) -> np.ndarray:
    """Return digests as marks, `[n]` int64: negative ones, as numbers of sequences are positive."""
    found = np.frombuffer(b"".join(digest[:8] for digest in digests), np.int64)
    return found | np.iinfo(np.int64).min
