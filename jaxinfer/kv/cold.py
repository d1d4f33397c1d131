"""Cached blocks that are worth least: a window has left them behind, and no prompt is known to part there."""

from collections.abc import Iterable

import numpy as np

from jaxinfer.kv.pool import BlockPool


class Cold:
    """Blocks in the order in which they were left. They are evicted before all others that are cached.

    A block may have been held, evicted or freed by other ways since; `take` passes such a one over.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, None] = {}

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def add(self, ids: Iterable[int]) -> None:
        """These were left behind."""
        self._blocks.update(dict.fromkeys(ids))

    def drop(self, ids: np.ndarray | list[int]) -> None:
        """These have got another use."""
        if self._blocks:
            for block in np.asarray(ids).tolist():
                self._blocks.pop(block, None)

    def take(self, pool: BlockPool, count: int) -> np.ndarray:
        """Up to `count` that are still cached, the oldest first; they are no longer here."""
        chosen: list[int] = []
        while self._blocks and len(chosen) < count:
            block = next(iter(self._blocks))
            del self._blocks[block]
            if pool.slot[block] >= 0:
                chosen.append(block)
        return np.array(chosen, np.int32)

    def clear(self) -> None:
        """None is."""
        self._blocks.clear()
