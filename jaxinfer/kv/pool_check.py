"""Check a block pool's accounting against all block tables."""

from collections.abc import Iterable

import numpy as np

from jaxinfer.kv.pool import NO_BLOCKS, BlockPool, Ids, PoolInvariantError, cached_ids
from jaxinfer.kv.pool_state import PoolState


def check(pool: BlockPool, tables: Iterable[Ids]) -> None:
    """Check the pool against all block tables, one array of ids per sequence (-1 = no block). Costs O(N).

    Raises:
        PoolInvariantError: reference counts differ from the table entries, a count is negative, free + cached + held is
            not N, or the stack or the list of cached blocks disagrees with the counts.
    """
    state = pool.current()
    size, refs, published = pool.num_blocks, state.refs_view, state.published_view
    named = np.concatenate([NO_BLOCKS, *(np.asarray(table, np.int32).ravel() for table in tables)])
    entries, unheld, order = _tally(named, size), refs == 0, cached_ids(pool)
    on_stack, in_list = _tally(np.array(state.free[: state.num_free], np.int32), size), _tally(order, size)
    links = np.append(order, size)
    preceding = np.roll(links, 1)
    follower, predecessor = np.array(state.follower), np.array(state.predecessor)
    faults = {
        "no such block": np.unique(named[named >= size]),
        "negative count": np.flatnonzero(refs < 0),
        "count differs from the table entries": np.flatnonzero(refs != entries),
        "stack differs from free": np.flatnonzero(on_stack != (unheld & ~published)),
        "list differs from cached": np.flatnonzero(in_list != (unheld & published)),
        "links of the list differ": links[(predecessor[links] != preceding) | (follower[preceding] != links)],
    }
    held = int((refs > 0).sum())
    total_is_right = state.num_free + state.num_cached + held == size
    found = {fault: ids for fault, ids in faults.items() if ids.size}
    if not found and total_is_right:
        return
    details = [f"{fault}: {_describe(state, ids, entries)}" for fault, ids in found.items()]
    raise PoolInvariantError("; ".join([state.accounting(held), *details]))


def _tally(ids: np.ndarray, size: int) -> np.ndarray:
    """Count how often each block occurs in ids [n], ignoring ids outside the pool: [N]."""
    return np.bincount(ids[(ids >= 0) & (ids < size)], minlength=size)


def _describe(state: PoolState, ids: np.ndarray, entries: np.ndarray, most: int = 8) -> str:
    shown = [
        f"block {i} (count {state.refs[i]}, table entries {entries[i]}, published {bool(state.published[i])})"
        if i < state.num_blocks
        else f"block {i}"
        for i in ids[:most].tolist()
    ]
    return ", ".join(shown) + (f" and {ids.size - most} more" if ids.size > most else "")
