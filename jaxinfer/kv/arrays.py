"""Updates of a host or a device array by position, written once for NumPy and for jnp under `jax.jit`.

They return a new array and leave the given one alone. A negative position means "nowhere": on the host
such entries are dropped, on the device they are sent past the end of the array, where a write is dropped.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Array: TypeAlias = np.ndarray | jax.Array
Count: TypeAlias = int | np.integer | jax.Array


def only(values: Array, chosen: Array) -> Array:
    """The values where chosen, -1 ("nothing") elsewhere; a value that is -1 stays it."""
    return (np if isinstance(chosen, np.ndarray) else jnp).where(chosen, values, -1)


def count_true(chosen: Array) -> Count:
    """How many are chosen: an int on the host, so that counters stay plain ints."""
    return int(np.count_nonzero(chosen)) if isinstance(chosen, np.ndarray) else chosen.sum(dtype=jnp.int32)


def put(array: Array, at: Array, values: Any) -> Array:
    """A copy of array with `values` written at the positions `at` [n] that are not negative."""
    if not isinstance(array, np.ndarray):
        return array.at[jnp.where(at < 0, array.shape[0], at)].set(values, mode="drop")
    keep = np.flatnonzero(at >= 0)
    if not keep.size:
        return array
    array = array.copy()
    array[at[keep]] = values[keep] if isinstance(values, np.ndarray) else values
    return array


def add(array: Array, at: Array, amount: int) -> Array:
    """A copy of array with `amount` added for each entry of `at` [n] that is not negative."""
    if not isinstance(array, np.ndarray):
        return array.at[jnp.where(at < 0, array.shape[0], at)].add(amount, mode="drop")
    array = array.copy()
    np.add.at(array, at[at >= 0], np.int32(amount))
    return array


def last_of_each(ids: Array, size: int) -> Array:
    """True [n] at the last entry of every id that is not negative, so that each block is counted once."""
    # Index -1 wraps to the extra element, which keeps "no block" apart from block size - 1.
    if isinstance(ids, np.ndarray):
        lane = np.arange(ids.size, dtype=np.int32)
        last = np.empty(size + 1, np.int32)  # read only where it was just written; NumPy keeps the last write
        last[ids] = lane
    else:
        lane = jnp.arange(ids.shape[0], dtype=jnp.int32)
        last = jnp.full(size + 1, -1, jnp.int32).at[ids].max(lane)
    return (ids >= 0) & (last[ids] == lane)
