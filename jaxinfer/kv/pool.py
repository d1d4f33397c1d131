"""Block pool of the paged cache: free, cached and held blocks, as a value that operations consume and return.

Each block is in exactly one state:

    free    refs == 0, not published    on the stack `free[0:num_free]`
    cached  refs == 0, published        in a doubly linked list, oldest release first
    held    refs >= 1                   in block tables, one entry per reference

Operations map a pool to a pool, like JAX functions with donated arrays: the argument is consumed and updated in place,
so the cost depends on the number of ids and not on the number of blocks. Using a consumed value raises. `begin` starts
a transaction, which `rollback` undoes operation by operation.

Operations are loops over ids, because few ids at a time are the rule and each call of NumPy costs as much as a dozen
ids. Negative ids mean "no block" and are skipped.
"""

from array import array
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from jaxinfer.errors import CapacityError, JaxInferError
from jaxinfer.kv.pool_state import NO_EVICTED, PoolState, read_only

Ids: TypeAlias = np.ndarray | Sequence[int]


class PoolInvariantError(JaxInferError, RuntimeError):
    """An invariant of the pool's accounting is violated; the message carries the accounting."""


class BlockPool:
    """Value of a pool of N blocks; operations consume it and return the next one."""

    __slots__ = ("state", "version")

    def __init__(self, state: PoolState, version: int):
        self.state, self.version = state, version

    @classmethod
    def create(cls, num_blocks: int) -> "BlockPool":
        """Create a pool of free blocks, allocated from id 0 upwards.

        Args:
            num_blocks: N, at least 1.

        Raises:
            CapacityError: `num_blocks` is less than 1.
        """
        if num_blocks < 1:
            raise CapacityError(
                f"num_blocks must be at least 1, got {num_blocks}; raise gpu_memory_utilization or num_blocks."
            )
        return cls(PoolState(num_blocks), 0)

    def __repr__(self) -> str:
        consumed = self.version != self.state.version
        return f"BlockPool({'consumed' if consumed else self.state.accounting()})"

    def current(self) -> PoolState:
        """Return the state.

        Raises:
            PoolInvariantError: the value is consumed.
        """
        if self.version != self.state.version:
            raise PoolInvariantError(
                f"version {self.version} of the block pool is consumed, version {self.state.version} is current; use "
                "the value that the last operation returned."
            )
        return self.state

    @property
    def refs(self) -> np.ndarray:
        """Number of block-table entries that name each block, [N] int32; a view that later operations change."""
        return self.current().refs_view

    @property
    def published(self) -> np.ndarray:
        """Whether each block's content is in the prefix index, [N] bool; a view that later operations change."""
        return self.current().published_view

    @property
    def num_blocks(self) -> int:
        """N, all blocks."""
        return self.state.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks without content."""
        return self.current().num_free

    @property
    def num_cached(self) -> int:
        """Published blocks without references."""
        return self.current().num_cached

    @property
    def num_held(self) -> int:
        """Blocks with at least one reference."""
        return self.current().num_held

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can return: free ones, then cached ones."""
        state = self.current()
        return state.num_free + state.num_cached


def begin(pool: BlockPool) -> BlockPool:
    """Begin a transaction; `rollback` makes `pool` current again.

    Raises:
        PoolInvariantError: a transaction is already open.
    """
    if pool.current().record is not None:
        raise PoolInvariantError("a transaction of the block pool is already open; commit or roll it back first.")
    state, after = _consume(pool)
    state.record, state.before = [], pool
    return after


def commit(pool: BlockPool) -> BlockPool:
    """End a transaction and keep its changes."""
    state, after = _consume(pool)
    state.record = state.before = None
    return after


def rollback(pool: BlockPool) -> BlockPool:
    """Undo the open transaction; return the value that `begin` consumed."""
    state = pool.current()
    for undo, argument in reversed(state.record):
        undo(argument)
    before, state.record, state.before = state.before, None, None
    state.version = before.version
    return before


def allocate(pool: BlockPool, n: int) -> tuple[BlockPool, np.ndarray, np.ndarray, bool]:
    """Allocate n blocks with one reference each: free blocks first, then cached ones, oldest release first.

    Args:
        pool: the pool.
        n: number of blocks.

    Returns:
        (pool, ids, evicted, ok). `ids` are int32 [n]; `evicted`, int32 [m], are those of them that were cached and are
        now unpublished: the caller removes them from the prefix index when it commits. If n exceeds the available
        blocks, `ok` is False and the pool is the argument, which is not consumed.

    Raises:
        ValueError: n is negative.
    """
    if n < 0:
        raise ValueError(f"n must be non-negative, got {n}.")
    state = pool.current()
    refs, top = state.refs, state.num_free
    if n > top + state.num_cached:
        return pool, NO_BLOCKS, NO_BLOCKS, False
    state, after = _consume(pool)
    bottom = top - n if top > n else 0
    ids, evicted = state.free[bottom:top], NO_EVICTED
    ids.reverse()
    state.num_free = bottom
    for block in ids:
        refs[block] = 1
    if len(ids) < n:
        evicted = state.evict(n - len(ids))
    if state.record is not None:
        state.record.append((state.undo_allocate, (ids, evicted)))
    return after, _as_array(ids + evicted if evicted else ids), _as_array(evicted), True


def share(pool: BlockPool, ids: Ids) -> BlockPool:
    """Add one reference for each entry of ids [n]; cached blocks become held.

    Raises:
        PoolInvariantError: a block is free or does not exist.
    """
    ids, (state, after) = _as_list(ids), _consume(pool)
    refs, following = state.refs, iter(ids)
    try:
        for block in following:
            if block >= 0:
                count = refs[block]
                if not count:
                    state.unlink_cached(block)
                refs[block] = count + 1
    except LookupError:
        state.undo_share(ids[: -1 - len(list(following))])
        raise _misuse(pool, block, "shared while free") from None
    if state.record is not None:
        state.record.append((state.undo_share, ids))
    return after


def release(pool: BlockPool, ids: Ids) -> BlockPool:
    """Remove one reference for each entry of ids [n]; blocks without references become cached or free.

    Blocks join the list of cached blocks in the order of their last entry in `ids`. Callers pass a sequence's blocks
    last first, so that the end of a prefix is evicted before its start.

    Raises:
        PoolInvariantError: a block has fewer references than entries in `ids`, or does not exist.
    """
    ids, (state, after) = _as_list(ids), _consume(pool)
    refs, links, following = state.refs, [], iter(ids)
    try:
        for block in following:
            if block >= 0:
                count = refs[block]
                if count < 2:
                    state.let_go(block, links)
                refs[block] = count - 1
    except LookupError:
        state.undo_release((ids[: -1 - len(list(following))], links))
        raise _misuse(pool, block, "released more often than it is held") from None
    if state.record is not None:
        state.record.append((state.undo_release, (ids, links)))
    return after


def publish(pool: BlockPool, ids: Ids) -> BlockPool:
    """Mark the held blocks ids [n] as being in the prefix index.

    Raises:
        PoolInvariantError: a block is not held.
    """
    ids, (state, after), changed = _as_list(ids), _consume(pool), []
    for block in ids:
        if block < 0:
            continue
        if block >= state.num_blocks or not state.refs[block]:
            state.undo_publish(changed)
            raise _misuse(pool, block, "published while not held")
        if not state.published[block]:
            state.published[block] = True
            changed.append(block)
    state.keep(state.undo_publish, changed)
    return after


def unpublish(pool: BlockPool, ids: Ids) -> BlockPool:
    """Mark the blocks ids [n] as no longer in the prefix index; cached ones become free."""
    (state, after), changed = _consume(pool), []
    for block in _as_list(ids):
        if block >= 0 and state.published[block]:
            state.published[block] = False
            changed.append(block)
            if not state.refs[block]:
                state.unlink(block)
                state.push(block)
    state.keep(state.undo_unpublish, changed)
    return after


def touch(pool: BlockPool, ids: Ids) -> BlockPool:
    """Move the cached blocks among ids [n] to the end of the list, as if released now."""
    (state, after), moved = _consume(pool), []
    for block in _as_list(ids):
        if block >= 0 and state.published[block] and not state.refs[block]:
            state.unlink(block)
            moved.append((block, state.append(block)))
    state.keep(state.undo_touch, moved)
    return after


def reset_published(pool: BlockPool) -> BlockPool:
    """Unpublish all blocks: every cached block becomes free. Costs O(N)."""
    cached = cached_ids(pool)
    return unpublish(unpublish(pool, cached), np.flatnonzero(pool.state.published_view))


def is_cached(pool: BlockPool, ids: np.ndarray) -> np.ndarray:
    """Return which of the blocks ids [n] are cached, [n] bool."""
    return pool.published[ids] & (pool.refs[ids] == 0)


def cached_ids(pool: BlockPool) -> np.ndarray:
    """Return the cached blocks [num_cached] int32, next to be evicted first."""
    state = pool.current()
    block, follower = state.num_blocks, state.follower
    return np.array([block := follower[block] for _ in range(state.num_cached)], np.int32)


def _consume(pool: BlockPool) -> tuple[PoolState, BlockPool]:
    """Consume a value; return the state to update and the value after the update."""
    state = pool.current()
    state.version = state.latest = version = state.latest + 1
    return state, BlockPool(state, version)


def _misuse(pool: BlockPool, block: int, fault: str) -> PoolInvariantError:
    """Make `pool` current again after a refused operation; return the error."""
    state = pool.state
    state.version = pool.version
    if block >= state.num_blocks:
        return PoolInvariantError(f"block {block} does not exist: the pool has {state.num_blocks} blocks.")
    return PoolInvariantError(f"block {block} is {fault} (count {state.refs[block]}); {state.accounting()}")


NO_BLOCKS = read_only(np.empty(0, np.int32))


def _as_array(ids: array) -> np.ndarray:
    return np.frombuffer(ids, np.int32) if ids else NO_BLOCKS


def _as_list(ids: Ids) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
