"""Recurrent state as seen by kernels: an array of slots, and the slots that the sequences of a step read and write.

A slot holds the state of one layer and one sequence after some position: the live state of a sequence, or a snapshot at
the end of a block. Tokens of several sequences are concatenated, `[T]`, as in prefill attention. Slot ids >= N are
padding: reads return zeros, writes are dropped. All functions take local shapes: under tensor parallelism they run
inside `jax.shard_map`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


class DecodeSlots(NamedTuple):
    """One new token per sequence."""

    sources: jax.Array
    """Slot of each sequence's current state, `[B]`; N or more for padding, in both arrays."""
    targets: jax.Array
    """Slot of each sequence's new state, `[B]`, often the same; distinct, and no other row's source."""


class Segments(NamedTuple):
    """Runs of tokens, each of one sequence and at consecutive positions, in the order of the step's tokens.

    A segment's state is written at its end only. A snapshot within a prefill chunk is therefore a cut into two
    segments, the second of which `continues` the first. No segment reads a slot that another one writes.
    """

    starts: jax.Array
    """Index of the first token in the step, `[R]`."""
    counts: jax.Array
    """Tokens, `[R]`; 0 for padding."""
    sources: jax.Array
    """Slot of the initial state, `[R]`; N or more to start from zeros, at the beginning of a sequence."""
    targets: jax.Array
    """Slot of the final state, `[R]`; N or more to drop it."""
    continues: jax.Array
    """Whether the segment starts from the final state of the previous one, whose tokens precede its own, `[R]` bool."""

    def owners(self, tokens: int) -> jax.Array:
        """Return the segment of each token, `[T]`; undefined for padding."""
        at = jnp.arange(tokens)
        inside = (at >= self.starts[:, None]) & (at < (self.starts + self.counts)[:, None])
        return jnp.argmax(inside, axis=0)

    def heads(self) -> jax.Array:
        """Return the first segment of the run of continued segments each one belongs to, `[R]`."""
        own = jnp.arange(self.starts.shape[0])
        return jax.lax.cummax(jnp.where(self.continues, 0, own))


class StepSegments(Segments):
    """Segments in which recurrent states advance one token at a time, as in decode: for deterministic steps."""

    __slots__ = ()


@jax.tree_util.register_static
@dataclass(frozen=True)
class FullSequences:
    """Whole sequences of equal length without cached state, for training."""

    length: int
    """Tokens per sequence; sequences are concatenated."""


def read(states: jax.Array, slots: jax.Array) -> jax.Array:
    """Read slots `[R]` of states `[N, ...]`: `[R, ...]`, zeros for ids out of range."""
    return states.at[slots].get(mode="fill", fill_value=0)


def write(states: jax.Array, slots: jax.Array, values: jax.Array) -> jax.Array:
    """Write values `[R, ...]` to slots `[R]` of states `[N, ...]`; ids out of range are dropped."""
    return states.at[slots].set(values.astype(states.dtype), mode="drop")
