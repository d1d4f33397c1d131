"""The contiguous cache: a row's capacity is reserved from the start, and its tokens are appended in place.

Row r of group g has the blocks [(g R + r) W, (g R + r + 1) W), so its keys and values lie in one piece and grow into
what follows. Its block table is a function of the row: none is kept, sent or looked up. For kernels it is a paged cache
whose block is the step by which a row grows.

It does what `vtensor_reserve_one_token` of PaddleNLP PR #9126 does with reserved virtual addresses, for any number of
tokens at once. What it has not, beside the paged cache (`kv.manager`): nothing is shared, so a fork copies what its row
has written, and no prefix is found again; memory that a row does not use serves no other; a layer with a window keeps
all positions and masks those behind it. What it needs not: allocation, eviction, preemption, tables.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kv import prefix_match
from jaxinfer.kv.cross_cache import NOTHING_READ, Encoded, EncodedBlocks, EncodedHit
from jaxinfer.kv.groups import SINGLE, KindGroups, own
from jaxinfer.kv.pool import PoolInvariantError
from jaxinfer.kv.prefix import PrefixIndex
from jaxinfer.kv.prefix_match import Hit
from jaxinfer.kv.recurrent import RecurrentStates
from jaxinfer.kv.tables import Tables

NO_PREFIXES = "a contiguous cache keeps no prefixes"


@dataclass(frozen=True)
class Regions:
    """Where the rows of a cache lie, in blocks."""

    rows: int
    """R."""
    width: int
    """W: blocks that are reserved for a row in each group."""
    groups: int = 1
    """G."""

    @property
    def blocks(self) -> int:
        """N."""
        return self.groups * self.rows * self.width

    def tables(self, rows: Any, width: int) -> Any:
        """`[G, B, width]` the first `width` blocks of rows `[B]`: the read length that a step is compiled for.

        In NumPy or jnp, as `rows` is. A number past the rows, as padding has, is that of the last.
        """
        xp = np if isinstance(rows, np.ndarray) else jnp
        firsts = (xp.arange(self.groups)[:, None] * self.rows + xp.minimum(rows, self.rows - 1)) * self.width
        return (firsts[..., None] + xp.arange(width)).astype(xp.int32)

    def widths(self, least: int) -> Iterator[int]:
        """The read lengths that steps are compiled for: `least` blocks, doubled on and on, and W."""
        while least < self.width:
            yield least
            least *= 2
        yield self.width


def fill(array: jax.Array, given: jax.Array, tables: Any) -> jax.Array:
    """Puts `[B, K, S, D]` at the beginning of rows whose blocks `[B, W]` are given, in `[N, K, P, D]`.

    Donated it happens in place. What is in the last block beyond S becomes 0.
    """
    size = array.shape[2]
    batch, heads, length, dim = given.shape
    width = -(-length // size)
    padded = jnp.pad(given.astype(array.dtype), ((0, 0), (0, 0), (0, width * size - length), (0, 0)))
    blocks = padded.reshape(batch, heads, width, size, dim).swapaxes(1, 2)
    return array.at[tables[:, :width]].set(blocks, mode="drop")


def read(array: jax.Array, tables: Any, length: int) -> jax.Array:
    """The reverse: the first `length` positions of rows, `[B, K, length, D]`."""
    width = -(-length // array.shape[2])
    blocks = array[tables[:, :width]].swapaxes(1, 2)
    return blocks.reshape(*blocks.shape[:2], -1, blocks.shape[-1])[:, :, :length]


class Reserved(NamedTuple):
    """Of the memory, in blocks."""

    num_blocks: int
    num_held: int
    """Reserved for rows in which a sequence runs, however long it is."""


class RowManager:
    """The host's view, in the place of `kv.manager.BlockManager`: who runs where, and what forks have yet to copy."""

    prefix_caching = False

    def __init__(self, regions: Regions, block_size: int, kinds: Sequence[KindGroups] = SINGLE, state_slots: int = 0):
        self.regions = regions
        self.kinds, self._all = own(kinds), tuple(kinds)
        self.tables = Tables(regions.rows, 0, block_size, kinds)
        """Lengths, and `counts`: W where a sequence runs. There are no blocks in it, as they follow from the row."""
        self.encoded = EncodedBlocks(kinds, PrefixIndex(block_size, kinds=len(kinds)), prefix_caching=False)
        self.states: RecurrentStates | None = None
        if state_slots:
            self.states = RecurrentStates(state_slots, regions.rows, PrefixIndex(block_size), 0, keep=False)
        self.block_size = block_size
        self._forks: dict[int, int] = {}
        """By row that was forked since the last step: the row it is to be copied from."""

    @property
    def pool(self) -> Reserved:
        """How much is in use."""
        return Reserved(self.regions.blocks, len(self.tables.used()) * self.regions.groups * self.regions.width)

    def lookup(self, *_: Any) -> Hit:
        """Nothing: no prefix is kept."""
        return prefix_match.nothing(self.kinds, NO_PREFIXES)

    def lookup_encoded(self, content: Encoded | None) -> EncodedHit:
        """What a sequence's encoder reads is computed for each of them."""
        return self.encoded.lookup(content, np.empty(0, bool))

    def admit(
        self, row: int, _hit: Hit, _tokens: int, _reach: int | None = None, encoded: EncodedHit = NOTHING_READ
    ) -> bool:
        """Takes an empty row; not one that a fork is yet to be copied from."""
        if row in self._forks.values():
            return False
        self.tables.counts[:, row] = self.regions.width
        self.tables.lengths[row], self.tables.read[row] = 0, encoded.length
        if self.states is not None:
            self.states.admit(row, None, 0)
        if encoded.missing:
            ids = self.regions.tables(np.array([row]), encoded.missing // self._all[-1].count)
            self.encoded.take(row, encoded, ids[self._all[-1].span, 0].T.ravel())
        return True

    def needed(self, *_: Any) -> int:
        """0: whether a row can be taken is no matter of blocks."""
        return 0

    def extend(self, _row: int, _start: int, _stop: int) -> bool:
        """There is room for a prompt's next chunk."""
        return True

    def grow(self, _rows: np.ndarray, _steps: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """There is room for more tokens. Sources and targets of what forks copy before anything is written."""
        copies = [np.empty((2, 0), np.int32), *(self._copies(*fork) for fork in self._forks.items())]
        self._forks.clear()
        sources, targets = np.concatenate(copies, axis=1)
        return sources, targets

    def _copies(self, target: int, source: int) -> np.ndarray:
        """`[2, n]` of all blocks that a row has begun, in every group."""
        tables = self.regions.tables(np.array([source, target]), self.regions.width)
        parts = []
        for kind in self._all:
            length = self.tables.read[target] if kind.kind.encoded else self.tables.lengths[target]
            some = tables[kind.span, :, : -(-int(length) // self.block_size)]
            parts.append(some.swapaxes(0, 1).reshape(2, -1))
        return np.concatenate(parts, axis=1)

    def fork(self, source: int, target: int) -> None:
        """Lets row `target` go on from where row `source` is, with a copy of its own in the place of what it had."""
        # A fork of what is itself a fork has the same origin, as the copies of a step read what was there before it.
        origin = self._forks.get(source, source)
        self._forks.pop(target, None)
        if origin != target:
            self._forks[target] = origin  # the last, behind those that read what lies in it still
        self.tables.fork(source, target)
        self.tables.unsent.clear()
        if self.states is not None:
            self.states.free(target)
            self.states.fork(source, target)

    def free(self, row: int, _digests: Sequence[bytes] = ()) -> None:
        """Empties a row."""
        self._forks.pop(row, None)
        if self.states is not None:
            self.states.free(row)
        self.encoded.leave(row)
        self.tables.clear(row)

    def publish_encoded(self, row: int) -> None:
        """What a row's encoder read is written; nobody else finds it."""
        self.encoded.publish(row)

    def take_evicted(self) -> None:
        """Nothing is evicted."""

    def withdraw(self, _digests: Sequence[bytes]) -> None:
        """Nothing was published."""

    def reset_index(self) -> None:
        """There is none."""

    def check(self) -> None:
        """Rows end within what is reserved for them; one where nobody runs is empty, and nothing is copied to it.

        Raises:
            PoolInvariantError: one does not hold.
        """
        if self.states is not None:
            self.states.check()
        tables, capacity = self.tables, self.regions.width * self.block_size
        wrong = (tables.lengths > capacity) | (tables.read > capacity)
        wrong |= (tables.lengths > 0) & (tables.counts == 0).any(axis=0)
        wrong[[row for row in self._forks if not tables.counts[0, row]]] = True
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise PoolInvariantError(
                f"row {row} of {tables.lengths[row]} positions ({tables.read[row]} of an encoder) has {capacity} "
                "reserved, "
                f"blocks in use {tables.counts[:, row].tolist()}, to be copied: {self._forks}"
            )
