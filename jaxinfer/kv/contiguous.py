"""Contiguous cache: reserve the full capacity of each row up front and append its tokens in place.

Row r of group g owns the blocks [(g R + r) W, (g R + r + 1) W), so its keys and values are contiguous. The block table
is computed from the row number: it is neither stored nor sent to the device. Kernels see a paged cache whose block is
the step by which a row grows.

Equivalent to `vtensor_reserve_one_token` of PaddleNLP PR #9126, which reserves virtual addresses, for any number of
tokens at once. Compared with the paged cache (`kv.manager`):

- nothing is shared: a fork copies the written blocks, and there is no prefix cache;
- memory reserved for one row cannot serve another;
- layers with a sliding window keep all positions and mask those outside the window;
- no allocation, eviction, preemption or block tables are needed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kv import prefix_match
from jaxinfer.kv.cross_cache import NO_ENCODER_INPUT, Encoded, EncodedBlocks, EncodedHit
from jaxinfer.kv.groups import SINGLE, KindGroups, own
from jaxinfer.kv.pool import PoolInvariantError
from jaxinfer.kv.prefix import PrefixIndex
from jaxinfer.kv.prefix_match import Hit
from jaxinfer.kv.recurrent import RecurrentStates
from jaxinfer.kv.tables import Tables
from jaxinfer.kv.written import WrittenPositions

NO_PREFIXES = "a contiguous cache has no prefix cache"


@dataclass(frozen=True)
class Regions:
    """Location of each row's blocks in the cache."""

    rows: int
    """R."""
    width: int
    """W: blocks reserved for a row in each group."""
    groups: int = 1
    """G."""

    @property
    def blocks(self) -> int:
        """N."""
        return self.groups * self.rows * self.width

    def tables(self, rows: Any, width: int) -> Any:
        """Compute block tables `[G, B, width]` of the first `width` blocks of rows `[B]`.

        `width` is the read length a step is compiled for. The result is NumPy or jnp, like `rows`. Row numbers >= R are
        padding and map to the last row.
        """
        xp = np if isinstance(rows, np.ndarray) else jnp
        firsts = (xp.arange(self.groups)[:, None] * self.rows + xp.minimum(rows, self.rows - 1)) * self.width
        return (firsts[..., None] + xp.arange(width)).astype(xp.int32)

    def widths(self, least: int) -> Iterator[int]:
        """Yield the read lengths that steps are compiled for: `least` blocks, doubled up to W, then W."""
        while least < self.width:
            yield least
            least *= 2
        yield self.width


def fill(array: jax.Array, given: jax.Array, tables: Any) -> jax.Array:
    """Write keys or values `[B, K, S, D]` to the start of rows with block tables `[B, W]` in a cache array `[N, K, P,
    D]`.

    Updates in place when `array` is donated. The rest of the last block, beyond S, is set to 0.
    """
    size = array.shape[2]
    batch, heads, length, dim = given.shape
    width = -(-length // size)
    padded = jnp.pad(given.astype(array.dtype), ((0, 0), (0, 0), (0, width * size - length), (0, 0)))
    blocks = padded.reshape(batch, heads, width, size, dim).swapaxes(1, 2)
    return array.at[tables[:, :width]].set(blocks, mode="drop")


def read(array: jax.Array, tables: Any, length: int) -> jax.Array:
    """Read the first `length` positions of rows with block tables `[B, W]`: `[B, K, length, D]`. Inverse of `fill`."""
    width = -(-length // array.shape[2])
    blocks = array[tables[:, :width]].swapaxes(1, 2)
    return blocks.reshape(*blocks.shape[:2], -1, blocks.shape[-1])[:, :, :length]


class Reserved(NamedTuple):
    """Memory use of the contiguous cache, in blocks."""

    num_blocks: int
    num_held: int
    """Blocks reserved for rows in use, whatever the length of their sequences."""


class RowManager(WrittenPositions):
    """Host-side manager of the contiguous cache, replacing `kv.manager.BlockManager`: tracks rows and fork copies."""

    prefix_caching = False

    def __init__(self, regions: Regions, block_size: int, kinds: Sequence[KindGroups] = SINGLE, state_slots: int = 0):
        self.regions = regions
        self.kinds, self._all = own(kinds), tuple(kinds)
        self.tables = Tables(regions.rows, 0, block_size, kinds)
        """Lengths, and `counts`: W for rows in use. Holds no blocks, since they follow from the row number."""
        self.encoded = EncodedBlocks(kinds, PrefixIndex(block_size, kinds=len(kinds)), prefix_caching=False)
        self.states: RecurrentStates | None = None
        if state_slots:
            self.states = RecurrentStates(state_slots, regions.rows, PrefixIndex(block_size), 0, snapshots=False)
        self.block_size = block_size
        self._forks: dict[int, int] = {}
        """Maps a row forked since the last step to the row it is to be copied from."""

    @property
    def pool(self) -> Reserved:
        """Memory in use."""
        return Reserved(self.regions.blocks, len(self.tables.used()) * self.regions.groups * self.regions.width)

    @property
    def index_version(self) -> int:
        """Constant: there is no prefix index."""
        return 0

    @property
    def usage(self) -> float:
        """Share of the blocks that are reserved for rows in use."""
        return self.pool.num_held / self.pool.num_blocks

    def blocks_of(self, row: int) -> np.ndarray:
        """Return the ids of all blocks that are reserved for a row in use, in every group."""
        return self.regions.tables(np.array([row]), self.regions.width).ravel()

    def cached_blocks(self) -> np.ndarray:
        """Return no ids: nothing is cached."""
        return np.empty(0, np.int32)

    def lookup(self, *_: Any) -> Hit:
        """Return an empty hit: the contiguous cache has no prefix cache."""
        return prefix_match.nothing(self.kinds, NO_PREFIXES)

    def lookup_encoded(self, content: Encoded | None) -> EncodedHit:
        """Return a miss: encoder inputs are computed for each sequence."""
        return self.encoded.lookup(content, np.empty(0, bool))

    def admit(
        self,
        row: int,
        _hit: Hit,
        _tokens: int,
        _chunk_end: int | None = None,
        encoded: EncodedHit = NO_ENCODER_INPUT,
        seen: tuple[int, int] = (0, 0),
    ) -> bool:
        """Assign an empty row to a sequence; False if a pending fork still has to be copied from that row."""
        if row in self._forks.values():
            return False
        self.tables.counts[:, row] = self.regions.width
        self.tables.lengths[row], self.tables.read[row], self.tables.seen[row] = 0, encoded.length, seen
        if self.states is not None:
            self.states.admit(row, None, 0)
        if encoded.missing:
            ids = self.regions.tables(np.array([row]), encoded.missing // self._all[-1].count)
            self.encoded.take(row, encoded, ids[self._all[-1].span, 0].T.ravel())
        return True

    def needed(self, *_: Any) -> int:
        """Return 0: admission depends on rows, not on blocks."""
        return 0

    def extend(self, _row: int, _start: int, _stop: int) -> bool:
        """Return True: the row's capacity is already reserved."""
        return True

    def grow(self, _rows: np.ndarray, _steps: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return the sources and targets of the block copies pending for forks, to run before the step writes."""
        copies = [np.empty((2, 0), np.int32), *(self._copies(*fork) for fork in self._forks.items())]
        self._forks.clear()
        sources, targets = np.concatenate(copies, axis=1)
        return sources, targets

    def _copies(self, target: int, source: int) -> np.ndarray:
        """List the source and target blocks `[2, n]` of all blocks the target row has begun, in every group."""
        tables = self.regions.tables(np.array([source, target]), self.regions.width)
        parts = []
        for kind in self._all:
            length = self.tables.read[target] if kind.kind.encoded else self.tables.lengths[target]
            some = tables[kind.span, :, : -(-int(length) // self.block_size)]
            parts.append(some.swapaxes(0, 1).reshape(2, -1))
        return np.concatenate(parts, axis=1)

    def fork(self, source: int, target: int) -> None:
        """Make row `target` continue from row `source`, with a copy of its blocks; discards the target's sequence."""
        # Forks of a pending fork copy the original row: all copies of a step read the cache as it was before the step.
        origin = self._forks.get(source, source)
        self._forks.pop(target, None)
        if origin != target:
            self._forks[target] = origin  # inserted last, after pending copies that still read this row's blocks
        self.tables.fork(source, target)
        self.tables.unsent.clear()
        if self.states is not None:
            self.states.free(target)
            self.states.fork(source, target)

    def free(self, row: int, _digests: Sequence[bytes] = ()) -> None:
        """Empty a row."""
        self._forks.pop(row, None)
        if self.states is not None:
            self.states.free(row)
        self.encoded.leave(row)
        self.tables.clear(row)

    def publish_encoded(self, row: int) -> None:
        """Mark a row's encoder input as written; it is not shared with other requests."""
        self.encoded.publish(row)

    def resend(self, _rows: Sequence[int]) -> None:
        """Do nothing: the device computes block tables from the rows."""

    def take_evicted(self) -> None:
        """Do nothing: nothing is evicted."""

    def withdraw(self, _digests: Sequence[bytes]) -> None:
        """Do nothing: nothing is published."""

    def reset_index(self) -> None:
        """Do nothing: there is no prefix index."""

    def check(self) -> None:
        """Check that rows stay within their reserved capacity, that unused rows are empty and are no fork targets.

        Raises:
            PoolInvariantError: a row violates this.
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
                f"row {row} has {tables.lengths[row]} positions ({tables.read[row]} of an encoder) of {capacity} "
                f"reserved, {tables.counts[:, row].tolist()} blocks in use; pending copies: {self._forks}"
            )
