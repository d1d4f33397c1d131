"""Block pool of the paged cache: free, cached and held blocks, as an immutable value with pure functions.

Each block is in exactly one state:

    free    refs == 0, not published    on the stack `free[0:num_free]`
    cached  refs == 0, published        in the queue `queue[head:tail]`, oldest release first
    held    refs >= 1                   in block tables, one entry per reference

The queue is invalidated lazily: a cached block that is shared again only clears its `slot`, and its stale queue entry
is skipped later. The entry at position q is live if `slot[queue[q]] == q`. When the queue is full, its live entries are
moved to the front, which costs O(N) once in N / 4 releases.

The functions run on NumPy arrays on the host and on jnp arrays under `jax.jit`. Negative ids mean "no block", so
batches can be padded to a fixed width. Misuse (releasing a block that is not held, sharing a free one) raises on the
host; code under jit cannot raise, so `check` finds it there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import CapacityError, JaxInferError
from jaxinfer.kv.arrays import Array, Count, add, count_true, last_of_each, only, put

Ids: TypeAlias = np.ndarray | jax.Array | Sequence[int]


class PoolInvariantError(JaxInferError, RuntimeError):
    """An invariant of the pool's accounting is violated; the message carries the accounting."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockPool:
    """State of N blocks. Q, the length of the queue's buffer, is at least N.

    Leaves are NumPy arrays and ints, or jnp arrays. Fields are annotated `Any` because jax also builds the pytree with
    other leaves (shapes, shardings).
    """

    refs: Any
    """Number of block-table entries that name the block, [N] int32."""
    published: Any
    """Whether the block's content is in the prefix index, [N] bool."""
    free: Any
    """Stack of free block ids, [N] int32; the first `num_free` entries are in use."""
    queue: Any
    """Cached block ids in release order, [Q] int32; in use from `head` up to `tail`."""
    slot: Any
    """Position in `queue` of a cached block's live entry, [N] int32; -1 for other blocks."""
    num_free: Any
    """Blocks on the stack, int."""
    num_cached: Any
    """Live entries in the queue, int."""
    head: Any
    """Lower bound of the queue positions with live entries, int."""
    tail: Any
    """Queue position of the next release, int."""

    @classmethod
    def create(cls, num_blocks: int, xp: Any = np) -> "BlockPool":
        """Create a pool of free blocks, allocated from id 0 upwards.

        Args:
            num_blocks: N, at least 1.
            xp: numpy or jax.numpy.

        Raises:
            CapacityError: `num_blocks` is less than 1.
        """
        if num_blocks < 1:
            raise CapacityError(
                f"num_blocks must be at least 1, got {num_blocks}; raise gpu_memory_utilization or num_blocks."
            )
        scalar = int if xp is np else xp.int32
        return cls(
            refs=xp.zeros(num_blocks, xp.int32),
            published=xp.zeros(num_blocks, bool),
            free=xp.arange(num_blocks - 1, -1, -1, dtype=xp.int32),
            queue=xp.full(num_blocks + num_blocks // 4, -1, xp.int32),
            slot=xp.full(num_blocks, -1, xp.int32),
            num_free=scalar(num_blocks),
            num_cached=scalar(0),
            head=scalar(0),
            tail=scalar(0),
        )

    @property
    def num_blocks(self) -> int:
        """N, all blocks."""
        return self.refs.shape[0]

    @property
    def num_held(self) -> Count:
        """Blocks with at least one reference."""
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_available(self) -> Count:
        """Blocks that `allocate` can return: free ones, then cached ones."""
        return self.num_free + self.num_cached


def allocate(pool: BlockPool, n: Count, width: int | None = None) -> tuple[BlockPool, Array, Array, Any]:
    """Allocate n blocks with one reference each: free blocks first, then cached ones, oldest release first.

    Args:
        pool: the pool.
        n: number of blocks; may be traced under jit.
        width: pads `ids` and `evicted` with -1 to [width]; required under jit.

    Returns:
        (pool, ids, evicted, ok). `ids` are int32 [n]; `evicted`, int32 [m], are those of them that were cached and are
        now
        unpublished: the caller removes them from the prefix index when it commits. If n exceeds the available blocks or
        `width`, `ok` is False and the pool is unchanged.

    Raises:
        ValueError: n is negative (NumPy), or n is traced and `width` is None.
    """
    host = _on_host(pool)
    if width is None and not isinstance(n, int | np.integer):
        raise ValueError("width must be given when n is traced, as it fixes the shape of the ids.")
    if host and n < 0:
        raise ValueError(f"n must be non-negative, got {n}.")
    lanes = int(n) if width is None else width
    ok = (n <= pool.num_available) & (n <= lanes)
    if host and not ok:
        none = np.full(0 if width is None else width, -1, np.int32)
        return pool, none, none, False
    n = int(n) if host else jnp.where(ok, n, 0)
    taken = min(n, pool.num_free) if host else jnp.minimum(n, pool.num_free)
    evicted, head = _oldest(pool, n - taken, lanes)

    xp = np if host else jnp
    lane = xp.arange(lanes, dtype=xp.int32)
    from_stack = pool.free[xp.maximum(pool.num_free - 1 - lane, 0)]
    ids = xp.where(lane < taken, from_stack, evicted[lane - taken])
    ids = xp.where(lane < n, ids, -1)
    pool = replace(
        pool,
        refs=put(pool.refs, ids, 1),
        published=put(pool.published, evicted, False),
        slot=put(pool.slot, evicted, -1),
        num_free=pool.num_free - taken,
        num_cached=pool.num_cached - (n - taken),
        head=head,
    )
    if width is None:
        evicted = evicted[: n - taken] if host else evicted
    return pool, ids, evicted, bool(ok) if host else ok


def share(pool: BlockPool, ids: Ids) -> BlockPool:
    """Add one reference for each entry of ids [n]; cached blocks become held.

    Raises:
        PoolInvariantError: a block is free or does not exist (NumPy only).
    """
    ids = _as_ids(pool, ids)
    cached = (ids >= 0) & (pool.slot[ids] >= 0)
    _require(cached | (pool.refs[ids] > 0) | (ids < 0), pool, ids, "shared while free")
    revived = only(ids, cached)
    return replace(
        pool,
        refs=add(pool.refs, ids, 1),
        slot=put(pool.slot, revived, -1),
        num_cached=pool.num_cached - count_true(last_of_each(revived, pool.num_blocks)),
    )


def release(pool: BlockPool, ids: Ids) -> BlockPool:
    """Remove one reference for each entry of ids [n]; blocks without references become cached or free.

    Blocks join the queue in the order of their last entry in `ids`. Callers pass a sequence's blocks last first, so
    that the end of a prefix is evicted before its start.

    Raises:
        PoolInvariantError: a block has fewer references than entries in `ids` (NumPy only).
    """
    ids = _as_ids(pool, ids)
    refs = add(pool.refs, ids, -1)
    _require((refs[ids] >= 0) | (ids < 0), pool, ids, "released more often than it is held")
    gone = last_of_each(only(ids, refs[ids] == 0), pool.num_blocks)
    published = pool.published[ids]
    pool = _push_free(replace(pool, refs=refs), ids, gone & ~published)
    return _push_queue(pool, ids, gone & published)


def publish(pool: BlockPool, ids: Ids) -> BlockPool:
    """Mark the held blocks ids [n] as being in the prefix index.

    Raises:
        PoolInvariantError: a block is not held (NumPy only).
    """
    ids = _as_ids(pool, ids)
    _require((pool.refs[ids] > 0) | (ids < 0), pool, ids, "published while not held")
    return replace(pool, published=put(pool.published, ids, True))


def unpublish(pool: BlockPool, ids: Ids) -> BlockPool:
    """Mark the blocks ids [n] as no longer in the prefix index; cached ones become free."""
    ids = _as_ids(pool, ids)
    cached = only(ids, pool.slot[ids] >= 0)
    freed = last_of_each(cached, pool.num_blocks)
    pool = replace(
        pool,
        published=put(pool.published, ids, False),
        slot=put(pool.slot, cached, -1),
        num_cached=pool.num_cached - count_true(freed),
    )
    return _push_free(pool, ids, freed)


def touch(pool: BlockPool, ids: Ids) -> BlockPool:
    """Move the cached blocks among ids [n] to the end of the queue, as if released now."""
    ids = _as_ids(pool, ids)
    cached = only(ids, pool.slot[ids] >= 0)
    moved = last_of_each(cached, pool.num_blocks)
    pool = replace(pool, slot=put(pool.slot, cached, -1), num_cached=pool.num_cached - count_true(moved))
    return _push_queue(pool, ids, moved)


def reset_published(pool: BlockPool) -> BlockPool:
    """Unpublish all blocks: every cached block becomes free."""
    live, _ = _live(pool)
    pool = unpublish(pool, only(pool.queue, live))
    return replace(pool, published=pool.published & False, head=pool.head * 0, tail=pool.tail * 0)


def cached_ids(pool: BlockPool) -> np.ndarray:
    """Return the cached blocks [num_cached] int32 on the host, next to be evicted first."""
    live, _ = _live(pool)
    return np.asarray(pool.queue)[np.asarray(live)]


def check(pool: BlockPool, tables: Iterable[Ids]) -> None:
    """Check the pool against all block tables, one array of ids per sequence (-1 = no block). Costs O(N).

    Raises:
        PoolInvariantError: reference counts differ from the table entries, a count is negative, free + cached + held is
            not N,
            or the stack or queue disagrees with the counts.
    """
    pool = BlockPool(**{field.name: np.asarray(getattr(pool, field.name)) for field in fields(pool)})
    size = pool.num_blocks
    flat = [np.asarray(table, np.int32).ravel() for table in tables]
    named = np.concatenate([np.zeros(0, np.int32), *flat])
    entries = _tally(named, size)
    on_stack = _tally(pool.free[: pool.num_free], size)
    in_queue = _tally(cached_ids(pool), size)
    idle = pool.refs == 0
    faults = {
        "no such block": np.unique(named[named >= size]),
        "negative count": np.flatnonzero(pool.refs < 0),
        "count differs from the table entries": np.flatnonzero(pool.refs != entries),
        "stack differs from free": np.flatnonzero(on_stack != (idle & ~pool.published)),
        "queue differs from cached": np.flatnonzero(in_queue != (idle & pool.published)),
        "slot of a block that is not cached": np.flatnonzero((pool.slot >= 0) != (in_queue > 0)),
    }
    held = int((pool.refs > 0).sum())
    total_is_right = pool.num_free + pool.num_cached + held == size and pool.num_cached == in_queue.sum()
    found = {fault: ids for fault, ids in faults.items() if ids.size}
    if not found and total_is_right:
        return
    details = [f"{fault}: {_describe(pool, ids, entries)}" for fault, ids in found.items()]
    raise PoolInvariantError("; ".join([_accounting(pool, held), *details]))


def _tally(ids: np.ndarray, size: int) -> np.ndarray:
    """Count how often each block occurs in ids [n], ignoring ids outside the pool: [N]."""
    return np.bincount(ids[(ids >= 0) & (ids < size)], minlength=size)


def _accounting(pool: BlockPool, held: int) -> str:
    return (
        f"free {pool.num_free} + cached {pool.num_cached} + held {held} of {pool.num_blocks} blocks "
        f"(references {pool.refs.sum()}, published {pool.published.sum()}, "
        f"queue {pool.head}..{pool.tail} of {pool.queue.size})"
    )


def _describe(pool: BlockPool, ids: np.ndarray, entries: np.ndarray, most: int = 8) -> str:
    shown = [
        f"block {i} (count {pool.refs[i]}, table entries {entries[i]}, published {bool(pool.published[i])})"
        if i < pool.num_blocks
        else f"block {i}"
        for i in ids[:most].tolist()
    ]
    return ", ".join(shown) + (f" and {ids.size - most} more" if ids.size > most else "")


def _push_free(pool: BlockPool, ids: Array, chosen: Array) -> BlockPool:
    """Push the chosen ids [n] on the stack of free blocks."""
    position = only(pool.num_free + chosen.cumsum() - 1, chosen)
    return replace(pool, free=put(pool.free, position, ids), num_free=pool.num_free + count_true(chosen))


def _push_queue(pool: BlockPool, ids: Array, chosen: Array) -> BlockPool:
    """Append the chosen ids [n] to the queue, compacting it first if it is full."""
    count = count_true(chosen)
    full = pool.tail + count > pool.queue.shape[0]
    if not _on_host(pool):
        pool = jax.lax.cond(full, _compact, lambda pool: pool, pool)
    elif full:
        pool = _compact(pool)
    position = only(pool.tail + chosen.cumsum() - 1, chosen)
    return replace(
        pool,
        queue=put(pool.queue, position, ids),
        slot=put(pool.slot, only(ids, chosen), position),
        num_cached=pool.num_cached + count,
        tail=pool.tail + count,
    )


def _compact(pool: BlockPool) -> BlockPool:
    """Move the live entries to the front of the queue, in order."""
    live, rank = _live(pool)
    queue = put(pool.queue * 0 - 1, only(rank, live), pool.queue)
    slot = put(pool.slot, only(pool.queue, live), rank)
    return replace(pool, queue=queue, slot=slot, head=pool.head * 0, tail=pool.head * 0 + pool.num_cached)


def _live(pool: BlockPool) -> tuple[Array, Array]:
    """Return which queue entries are live [Q], and the number of live ones before each [Q] int32."""
    xp = np if isinstance(pool.queue, np.ndarray) else jnp
    at = xp.arange(pool.queue.shape[0], dtype=xp.int32)
    live = (at >= pool.head) & (at < pool.tail) & (pool.slot[pool.queue] == at)
    return live, live.cumsum(dtype=xp.int32) - 1


def _oldest(pool: BlockPool, count: Count, width: int) -> tuple[Array, Count]:
    """Return the first `count` live queue entries, padded with -1 to [width], and the new head."""
    if not _on_host(pool):
        live, rank = _live(pool)
        chosen = live & (rank < count)
        at = jnp.where(chosen, jnp.arange(live.shape[0], dtype=jnp.int32), -1)
        ids = put(jnp.full(width, -1, jnp.int32), only(rank, chosen), pool.queue)
        return ids, jnp.maximum(pool.head, at.max() + 1)
    ids = np.full(width, -1, np.int32)
    if count == 0:
        return ids, pool.head
    # Each stale entry is skipped only once, so eviction is amortized O(count) whatever the queue's length.
    span = 2 * count
    while True:
        stop = min(pool.head + span, pool.tail)
        at = np.arange(pool.head, stop, dtype=np.int32)
        live = at[pool.slot[pool.queue[pool.head : stop]] == at][:count]
        if live.size == count:
            break
        if stop == pool.tail:
            found = f"the queue has {live.size} live entries, but {count} blocks must be evicted; "
            raise PoolInvariantError(found + _accounting(pool, int(pool.num_held)))
        span *= 2
    ids[:count] = pool.queue[live]
    return ids, int(live[-1]) + 1


def _on_host(pool: BlockPool) -> bool:
    return isinstance(pool.refs, np.ndarray)


def _as_ids(pool: BlockPool, ids: Ids) -> Array:
    if not _on_host(pool):
        return jnp.asarray(ids, jnp.int32)
    ids = np.asarray(ids, np.int32)
    if ids.size and ids.max() >= pool.num_blocks:
        raise PoolInvariantError(f"block {ids.max()} does not exist: the pool has {pool.num_blocks} blocks.")
    return np.maximum(ids, -1)


def _require(fine: Array, pool: BlockPool, ids: Array, fault: str) -> None:
    if _on_host(pool) and not fine.all():
        bad = int(ids[~fine][0])
        raise PoolInvariantError(
            f"block {bad} is {fault} (count {pool.refs[bad]}); " + _accounting(pool, int(pool.num_held))
        )


class EvictFirst:
    """Keep cached blocks to be evicted before all others, in the order they were added.

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
        while self._blocks and len(chosen) < count:
            block = next(iter(self._blocks))
            del self._blocks[block]
            if pool.slot[block] >= 0:
                chosen.append(block)
        return np.array(chosen, np.int32)

    def clear(self) -> None:
        """Remove all blocks."""
        self._blocks.clear()
