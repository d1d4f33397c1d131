"""Arrays behind the values of a block pool (`kv.pool`), changed in place, and how each operation is undone."""

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

NO_EVICTED = array("i")


def read_only(view: np.ndarray) -> np.ndarray:
    """Return an array after making it read-only."""
    view.flags.writeable = False
    return view


class PoolState:
    """Counts and lists of N blocks, updated in place; shared by all values of a pool, of which one is current.

    The list of cached blocks is circular: node N precedes the oldest and follows the newest block.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = self.num_free = num_blocks
        self.num_cached = 0
        self.refs = array("i", bytes(4 * num_blocks))
        """Number of block-table entries that name each block."""
        self.published = bytearray(num_blocks)
        """Whether each block's content is in the prefix index."""
        self.free = array("i", range(num_blocks - 1, -1, -1))
        """Stack of free block ids; the first `num_free` entries are in use."""
        self.follower = array("i", [num_blocks]) * (num_blocks + 1)
        """Next block of each cached block in the list."""
        self.predecessor = array("i", [num_blocks]) * (num_blocks + 1)
        self.version = self.latest = 0
        """Current version, and the latest one: they differ after a rollback."""
        self.record: list[tuple[Callable[..., None], Any]] | None = None
        """Undo function and its argument for each operation of the open transaction; None outside of transactions."""
        self.before: Any = None
        """Value at the start of the open transaction."""
        self.refs_view = read_only(np.frombuffer(self.refs, np.int32))
        self.published_view = read_only(np.frombuffer(self.published, bool))

    @property
    def num_held(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - self.num_free - self.num_cached

    def accounting(self, held: int | None = None) -> str:
        """Describe the counts for an error message; `held` replaces the number of held blocks."""
        held = self.num_held if held is None else held
        return (
            f"free {self.num_free} + cached {self.num_cached} + held {held} of {self.num_blocks} blocks "
            f"(references {self.refs_view.sum()}, published {self.published_view.sum()})"
        )

    def unlink(self, block: int) -> None:
        """Remove a block from the list of cached blocks; its own links stay, for `relink`."""
        before, after = self.predecessor[block], self.follower[block]
        self.follower[before], self.predecessor[after] = after, before
        self.num_cached -= 1

    def relink(self, block: int) -> None:
        """Put a block back where `unlink` took it from; later changes must be undone first."""
        self.follower[self.predecessor[block]] = self.predecessor[self.follower[block]] = block
        self.num_cached += 1

    def append(self, block: int) -> tuple[int, int]:
        """Append a block to the list of cached blocks; return its former links, for `undo_append`."""
        former, end = (self.predecessor[block], self.follower[block]), self.num_blocks
        self.predecessor[block], self.follower[block] = self.predecessor[end], end
        self.relink(block)
        return former

    def undo_append(self, block: int, former: tuple[int, int]) -> None:
        """Remove the newest block from the list and restore its former links."""
        self.unlink(block)
        self.predecessor[block], self.follower[block] = former

    def push(self, block: int) -> None:
        """Push a block on the stack of free blocks."""
        self.free[self.num_free] = block
        self.num_free += 1

    def unlink_cached(self, block: int) -> None:
        """Remove a block without references from the list; LookupError if it is free, not cached."""
        if not self.published[block]:
            raise LookupError
        self.unlink(block)

    def let_go(self, block: int, links: list[tuple[int, int]]) -> None:
        """Make a block cached or free as its last reference goes; LookupError if it has none."""
        if not self.refs[block]:
            raise LookupError
        if self.published[block]:
            links.append(self.append(block))
        else:
            self.free[self.num_free] = block
            self.num_free += 1

    def evict(self, count: int) -> array:
        """Take the oldest blocks of the list, unpublish them and give them one reference."""
        evicted = array("i")
        for _ in range(count):
            block = self.follower[self.num_blocks]
            self.unlink(block)
            self.refs[block], self.published[block] = 1, False
            evicted.append(block)
        return evicted

    def keep(self, undo: Callable[..., None], argument: Any) -> None:
        """Record how to undo an operation, if a transaction is open; frequent operations inline this."""
        if self.record is not None:
            self.record.append((undo, argument))

    def undo_allocate(self, taken: tuple[array, array]) -> None:
        """Put allocated blocks back on the stack and to the start of the list of cached blocks."""
        ids, evicted = taken
        for block in reversed(evicted):
            self.refs[block], self.published[block] = 0, True
            self.relink(block)
        for block in reversed(ids):
            self.refs[block] = 0
            self.push(block)

    def undo_share(self, ids: list[int]) -> None:
        """Remove references that were added."""
        for block in reversed(ids):
            if block >= 0:
                self.refs[block] -= 1
                if not self.refs[block]:
                    self.relink(block)

    def undo_release(self, released: tuple[list[int], list[tuple[int, int]]]) -> None:
        """Add references that were removed."""
        ids, links = released
        for block in reversed(ids):
            if block >= 0:
                if not self.refs[block]:
                    if self.published[block]:
                        self.undo_append(block, links.pop())
                    else:
                        self.num_free -= 1
                self.refs[block] += 1

    def undo_publish(self, ids: list[int]) -> None:
        """Unmark held blocks."""
        for block in ids:
            self.published[block] = False

    def undo_unpublish(self, ids: list[int]) -> None:
        """Mark blocks again, and move those that became free back to the list of cached blocks."""
        for block in reversed(ids):
            self.published[block] = True
            if not self.refs[block]:
                self.num_free -= 1
                self.relink(block)

    def undo_touch(self, moved: list[tuple[int, tuple[int, int]]]) -> None:
        """Move blocks back from the end of the list of cached blocks."""
        for block, former in reversed(moved):
            self.undo_append(block, former)
            self.relink(block)
