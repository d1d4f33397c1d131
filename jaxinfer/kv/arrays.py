"""Indexed array updates that run on NumPy arrays and on jnp arrays under `jax.jit`.

Each function returns a new array and leaves its argument unchanged. A negative index means "no entry": NumPy drops it,
jnp maps it past the end of the array, where the write is dropped (`mode="drop"`).
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Array: TypeAlias = np.ndarray | jax.Array
Count: TypeAlias = int | np.integer | jax.Array


def only(values: Array, chosen: Array) -> Array:
    """Mask `values` with -1 ("no entry") where `chosen` is False; values that are already -1 stay -1."""
    return (np if isinstance(chosen, np.ndarray) else jnp).where(chosen, values, -1)


def count_true(chosen: Array) -> Count:
    """Count the true entries; an int for NumPy input, so that counters stay plain ints."""
    return int(np.count_nonzero(chosen)) if isinstance(chosen, np.ndarray) else chosen.sum(dtype=jnp.int32)


def put(array: Array, at: Array, values: Any) -> Array:
    """Return a copy of `array` with `values` written at the non-negative indices `at` [n]."""
    if not isinstance(array, np.ndarray):
        return array.at[jnp.where(at < 0, array.shape[0], at)].set(values, mode="drop")
    keep = np.flatnonzero(at >= 0)
    if not keep.size:
        return array
    array = array.copy()
    array[at[keep]] = values[keep] if isinstance(values, np.ndarray) else values
    return array


def add(array: Array, at: Array, amount: int) -> Array:
    """Return a copy of `array` with `amount` added once for each non-negative index in `at` [n]."""
    if not isinstance(array, np.ndarray):
        return array.at[jnp.where(at < 0, array.shape[0], at)].add(amount, mode="drop")
    array = array.copy()
    np.add.at(array, at[at >= 0], np.int32(amount))
    return array


def last_of_each(ids: Array, size: int) -> Array:
    """Mark the last entry of every non-negative id [n], so that each block is counted once."""
    # Index -1 wraps to the extra element, so "no block" does not collide with block size - 1.
    if isinstance(ids, np.ndarray):
        lane = np.arange(ids.size, dtype=np.int32)
        last = np.empty(size + 1, np.int32)  # uninitialized: read only where written below; NumPy keeps the last write
        last[ids] = lane
    else:
        lane = jnp.arange(ids.shape[0], dtype=jnp.int32)
        last = jnp.full(size + 1, -1, jnp.int32).at[ids].max(lane)
    return (ids >= 0) & (last[ids] == lane)
