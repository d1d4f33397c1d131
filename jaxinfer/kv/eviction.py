"""Cached blocks that the pool evicts before all others."""

from collections.abc import Iterable

import numpy as np

from jaxinfer.kv.pool import BlockPool


class EvictFirst:
    """Queue of cached blocks that are evicted before all others, in the order they were added.

    These are blocks left behind by a sliding window, away from any known shared prefix end. A block may have been held,
    evicted or freed since it was added; `take` skips such blocks.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, None] = {}

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def add(self, ids: Iterable[int]) -> None:
        """Add blocks."""
        self._blocks.update(dict.fromkeys(ids))

    def drop(self, ids: np.ndarray | list[int]) -> None:
        """Remove blocks that are in use again."""
        if self._blocks:
            for block in np.asarray(ids).tolist():
                self._blocks.pop(block, None)

    def take(self, pool: BlockPool, count: int) -> np.ndarray:
        """Remove and return up to `count` blocks that are still cached, the oldest first."""
        chosen: list[int] = []
        refs, published = pool.refs, pool.published
        while self._blocks and len(chosen) < count:
            block = next(iter(self._blocks))
            del self._blocks[block]
            if published[block] and not refs[block]:
                chosen.append(block)
        return np.array(chosen, np.int32)

    def clear(self) -> None:
        """Remove all blocks."""
        self._blocks.clear()
