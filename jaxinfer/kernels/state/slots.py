"""Recurrent state as kernels see it: an array of slots, and which of them the sequences of a step read and write.

A slot holds what one layer remembers of one sequence up to some position. Its number means nothing: it may be the live
state of a sequence or a snapshot at the end of a block. Tokens of several sequences lie one after another, `[T]`, as in
attention's prefill; slots of N or more are nobody's: read as zeroes, never written.
All functions see local shapes: under tensor parallelism they run inside `jax.shard_map`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


class DecodeSlots(NamedTuple):
    """One new token a sequence."""

    sources: jax.Array
    """`[B]` the slot whose state each goes on from; N or more for a row of padding, in both."""
    targets: jax.Array
    """`[B]` the slot that takes the state after it, often the same; each once, and no other row's source."""


class Segments(NamedTuple):
    """Runs of tokens, each of one sequence and at positions that follow each other, in the order of the step's tokens.

    A segment's state is written where it ends, and only there. So a snapshot inside a chunk of a prompt is a cut: two
    segments, of which the second `continues` the first. A slot that is written is read by no other segment.
    """

    starts: jax.Array
    """`[R]` index of the first token in the step."""
    counts: jax.Array
    """`[R]` tokens; 0 for padding."""
    sources: jax.Array
    """`[R]` the slot whose state it starts from; N or more: from zeroes, a sequence's beginning."""
    targets: jax.Array
    """`[R]` the slot that takes its last state; N or more: none does."""
    continues: jax.Array
    """`[R]` bool: it goes on from the state of the segment before it, whose tokens end where its own begin."""

    def owners(self, tokens: int) -> jax.Array:
        """`[T]` the segment of each token; of one that is in none (padding) it means nothing."""
        at = jnp.arange(tokens)
        inside = (at >= self.starts[:, None]) & (at < (self.starts + self.counts)[:, None])
        return jnp.argmax(inside, axis=0)

    def heads(self) -> jax.Array:
        """`[R]` the segment at which the run of segments that continue each other begins."""
        own = jnp.arange(self.starts.shape[0])
        return jax.lax.cummax(jnp.where(self.continues, 0, own))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Whole:
    """Sequences of one length, from their beginning to their end, of which nothing is kept: what is differentiated."""

    length: int
    """Tokens of each; those of all lie one after another."""


def read(states: jax.Array, slots: jax.Array) -> jax.Array:
    """`[N, ...]` by `[R]` -> `[R, ...]`; zeroes where there is no such slot."""
    return states.at[slots].get(mode="fill", fill_value=0)


def write(states: jax.Array, slots: jax.Array, values: jax.Array) -> jax.Array:
    """The states `[N, ...]` with `values` `[R, ...]` in their slots; where there is no such slot they go nowhere."""
    return states.at[slots].set(values.astype(states.dtype), mode="drop")
