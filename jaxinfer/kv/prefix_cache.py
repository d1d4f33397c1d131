"""Prefix cache of the paged cache: the block pool with the index of the blocks whose content is known.

Blocks evicted by a step are collected, and leave the index when the step is committed (`take_evicted`). Until then a
prefix hit ends before such a block, because the pool no longer marks it as published.
"""

from collections.abc import Sequence

import numpy as np

from jaxinfer.kv import pool as pools
from jaxinfer.kv import prefix_match
from jaxinfer.kv.cross_cache import Encoded, EncodedBlocks, EncodedHit
from jaxinfer.kv.digests import NO_EXTRAS, Extras
from jaxinfer.kv.eviction import EvictFirst
from jaxinfer.kv.groups import KindGroups, count, own
from jaxinfer.kv.pool import BlockPool
from jaxinfer.kv.prefix import PrefixIndex
from jaxinfer.kv.prefix_match import Hit
from jaxinfer.kv.recurrent import RecurrentStates
from jaxinfer.kv.spec import Recurrent


class PrefixCache:
    """Block pool, prefix index, encoder inputs and state slots: what is free, cached and found.

    Args:
        num_blocks: N.
        rows: rows of the batch, R.
        block_size: P.
        prefix_caching: whether blocks are kept and shared between requests.
        kinds: groups of the model's layers.
        state_slots: slots for recurrent state; 0 for models without recurrent layers.
    """

    def __init__(
        self,
        num_blocks: int,
        rows: int,
        block_size: int,
        *,
        prefix_caching: bool,
        kinds: Sequence[KindGroups],
        state_slots: int,
    ):
        self.pool = BlockPool.create(num_blocks)
        self.kinds = own(kinds)
        """Kinds that store the sequences' own positions, as opposed to encoder positions."""
        self.index = PrefixIndex(block_size, kinds=len(kinds) + 1)
        self.encoded = EncodedBlocks(kinds, self.index, prefix_caching=prefix_caching)
        self.states: RecurrentStates | None = None
        """State slots of recurrent layers; None if the model has none."""
        if state_slots:
            self.states = RecurrentStates(state_slots, rows, self.index, num_blocks, snapshots=prefix_caching)
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.evict_first = EvictFirst()
        self._evicted: list[np.ndarray] = []
        self._newly_published: list[int] = []

    @property
    def pool(self) -> BlockPool:
        """The current pool. Blocks published since the last access are marked here in one batch."""
        if self._newly_published:
            self._pool = pools.publish(self._pool, np.array(self._newly_published, np.int32))
            self._newly_published = []
        return self._pool

    @pool.setter
    def pool(self, pool: BlockPool) -> None:
        self._pool = pool

    @property
    def index_version(self) -> int:
        """Number that changes whenever `lookup` may find another hit: a block is published or evicted."""
        return self.index.version

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold; may be read from any thread while a step runs."""
        return self._pool.state.num_held / self._pool.num_blocks

    def digests(
        self, tokens: np.ndarray, root: bytes, known: Sequence[bytes] = (), extras: Extras = NO_EXTRAS
    ) -> list[bytes]:
        """Compute the chained digests of the full blocks of `tokens`; `known` leading ones are not recomputed."""
        return self.index.chain(tokens, root, known, extras)

    def extend_digests(self, digests: list[bytes], tokens: np.ndarray, root: bytes, extras: Extras = NO_EXTRAS) -> None:
        """Append the missing digests of the full blocks of `tokens` to `digests`, in place."""
        self.index.extend(digests, tokens, root, extras)

    def lookup(self, tokens: np.ndarray, digests: Sequence[bytes], root: bytes, extras: Extras = NO_EXTRAS) -> Hit:
        """Find the longest usable prefix: at most floor((L - 1) / P) blocks, so that at least one token is computed."""
        if not self.prefix_caching:
            return prefix_match.nothing(self.kinds, "prefix caching is off")
        most = max(0, (len(tokens) - 1) // self.block_size)
        found = self.index.match(digests[:most], tokens, root, extras)
        kinds = self.kinds
        if self.states is not None:
            kinds = *kinds, KindGroups(Recurrent(), count(kinds))
        return prefix_match.longest(kinds, found, self._are_published, most, self.block_size)

    def _are_published(self, ids: np.ndarray) -> np.ndarray:
        """Return which of these numbers of the index, blocks and state slots, are published; False for -1."""
        blocks, states = self.pool.published, self.states
        if states is None:
            return blocks[ids] & (ids >= 0)
        slots = ids - len(blocks)
        of_blocks, of_slots = blocks[np.where(slots < 0, ids, 0)], states.published[np.maximum(slots, 0)]
        return np.where(slots < 0, of_blocks, of_slots) & (ids >= 0)

    def lookup_encoded(self, content: Encoded | None) -> EncodedHit:
        """Find the blocks of an encoder input (None if the sequence has none); all of them or none."""
        return self.encoded.lookup(content, self.pool.published)

    def _allocate(self, pool: BlockPool, n: int) -> tuple[BlockPool, np.ndarray] | None:
        """Allocate n blocks, evicting those marked to go first before other cached ones; None if there are too few."""
        if n > pool.num_available:
            return None
        if self.evict_first and n > pool.num_free:
            chosen = self.evict_first.take(pool, n - pool.num_free)
            self._evict(chosen)
            pool = pools.unpublish(pool, chosen)
        pool, ids, evicted, _ = pools.allocate(pool, n)
        self._evict(evicted)
        self.evict_first.drop(ids)
        return pool, ids

    def _evict(self, ids: np.ndarray) -> None:
        """Remember blocks that the pool no longer marks as published; they leave the index with the plan."""
        if len(ids):
            self._evicted.append(ids)
            self.index.mark_changed()

    def take_evicted(self) -> None:
        """Remove blocks evicted since the last call from the index, with the other blocks of the same nodes."""
        ids = list(self._evicted)
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

    def withdraw(self, digests: Sequence[bytes]) -> None:
        """Remove the blocks with these digests from the index, because their content was found to be bad."""
        self._unpublish(self.index.withdraw(digests))

    def reset_index(self) -> None:
        """Unpublish all blocks."""
        self.index.clear()
        self._evicted.clear()
        self.evict_first.clear()
        self.pool = pools.reset_published(self.pool)
        if self.states is not None:
            self.states.reset_published()
