"""Loops of recurrences over the sequences and chunks of a step.

A recurrence (`kernels.state.delta`, `kernels.state.ssd`) gives its operations on a state `[H, Dk, Dv]`: `step` for one
token, `chunk` for what of a chunk does not depend on the state, `advance` for the rest. Its tokens are a named tuple of
float32 arrays `[T, heads, width]`, zeros of which leave the state as it is, with values `v` `[T, H, Dv]`.

All computations are in float32. Axes: H heads, C tokens of a chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxinfer.kernels.state.slots import DecodeSlots, FullSequences, Segments
from jaxinfer.kernels.state.slots import read as read_slots
from jaxinfer.kernels.state.slots import write as write_slots

dot = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
"""Einsum at full precision."""

Step: TypeAlias = Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
"""Process one token for each state: tokens `[B, ...]`, states `[B, H, Dk, Dv]` -> outputs `[B, H, Dv]`, new states."""
Chunk: TypeAlias = Callable[[Any], Any]
"""Compute the state-independent part of chunks: tokens `[..., H, C, .]`, C a power of two -> a tuple of arrays."""
Advance: TypeAlias = Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
"""Apply a chunk to a state `[H, Dk, Dv]`: outputs `[H, C, Dv]` and the new state."""

CHUNK, CPU_CHUNK = 64, 32
"""Maximum tokens of a prefill chunk; powers of two. On a CPU 32 was faster than 64 for the delta rule, whose last
chunks have more padding: 16 heads of 128 channels take 19 against 23 ms for one segment of 512 tokens, 20 against 37
for 16 of 32 (jax 0.12, two cores with other work on them). The GPU value is estimated, not measured."""


def decode(
    step: Step, tokens: Any, states: jax.Array, rows: DecodeSlots, *, one_by_one: bool
) -> tuple[jax.Array, jax.Array]:
    """Process one token per sequence.

    Args:
        step: the recurrence.
        tokens: B tokens.
        states: `[N, H, Dk, Dv]`.
        rows: state slots of each sequence.
        one_by_one: whether to loop over sequences and update each state in place: on a CPU 2.5 times as fast as
            gathering and scattering all (8 sequences of 1 MiB: 0.50 against 1.3 ms).

    Returns:
        `[B, H, Dv]`, undefined for padding, and the updated states.
    """
    (sources, targets), count = rows, states.shape[0]
    if not one_by_one:
        # Clamp instead of filling with zeros: results for padding are dropped anyway.
        outputs, new = step(tokens, states.at[sources].get(mode="clip"))
        return outputs, write_slots(states, targets, new)

    def one(row: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        outputs, states = carry
        source, target = jnp.minimum(sources[row], count - 1), jnp.minimum(targets[row], count - 1)
        old = jax.lax.dynamic_slice_in_dim(states, source, 1)
        output, new = step(jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, row, 1), tokens), old)
        # Padding has equal source and target, which is left unchanged.
        new = jnp.where(targets[row] < count, new, old)
        # XLA may fuse the read into what computes the output, and then copies all states if nothing says that it is
        # before the write. Barriers end before fusion, so the write's index is made to depend on the output.
        output, new = jax.lax.optimization_barrier((output, new))
        target = target + _zero(output)
        states = jax.lax.dynamic_update_slice_in_dim(states, new, target, 0)
        return jax.lax.dynamic_update_slice_in_dim(outputs, output, row, 0), states

    return jax.lax.fori_loop(0, sources.shape[0], one, (jnp.zeros_like(tokens.v), states))


def _zero(x: jax.Array) -> jax.Array:
    """Return the integer 0 such that XLA computes it from `x`, which it cannot do without."""
    bits = jax.lax.bitcast_convert_type(x.ravel()[0].astype(jnp.float32), jnp.int32)
    return jnp.minimum(jax.lax.shift_right_logical(bits, 1), 0)


def prefill_steps(
    step: Step, tokens: Any, states: jax.Array, segments: Segments, *, one_by_one: bool
) -> tuple[jax.Array, jax.Array]:
    """Process runs of tokens as `prefill`, one token at a time by the same operation on the state.

    The state after a token then has the same bits wherever chunks and segments begin, which no chunked form has. On a
    CPU the delta rule takes 1.6 times as long as in chunks (16 heads of 128 channels).

    Args:
        step: the recurrence.
        tokens: T tokens, all segments concatenated.
        states: `[N, H, Dk, Dv]`.
        segments: tokens and state slots of the segments.
        one_by_one: ignored.

    Returns:
        `[T, H, Dv]`, 0 for padding, and the updated states.
    """

    def one_segment(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        outputs, states, state = carry
        fresh = read_slots(states, segments.sources[number][None])
        state = jnp.where(segments.continues[number], state, fresh)
        start = segments.starts[number]

        def one_token(at: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            outputs, state = carry
            made, state = step(jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, at, 1), tokens), state)
            return jax.lax.dynamic_update_slice_in_dim(outputs, made, at, 0), state

        outputs, state = jax.lax.fori_loop(start, start + segments.counts[number], one_token, (outputs, state))
        target = jnp.where(segments.counts[number] > 0, segments.targets[number], states.shape[0])
        return outputs, write_slots(states, target[None], state), state

    begin = jnp.zeros_like(tokens.v), states, jnp.zeros((1, *states.shape[1:]))
    last = jnp.max(jnp.where(segments.counts > 0, jnp.arange(segments.counts.shape[0]) + 1, 0))
    outputs, states, _ = jax.lax.fori_loop(0, last, one_segment, begin)
    return outputs, states


def prefill(
    chunk: Chunk, advance: Advance, tokens: Any, states: jax.Array, segments: Segments, *, one_by_one: bool
) -> tuple[jax.Array, jax.Array]:
    """Process runs of tokens of several sequences, each from its own state.

    Chunks are aligned to the start of each segment, so that a segment's result does not depend on other segments, and
    NaN does not spread to other segments.

    Args:
        chunk: state-independent part of the recurrence.
        advance: the rest.
        tokens: T tokens, all segments concatenated.
        states: `[N, H, Dk, Dv]`.
        segments: tokens and state slots of the segments.
        one_by_one: whether each chunk is computed in turn (CPU: the work is proportional to the tokens), or the
            state-independent part of all chunks at once (GPU: loops are expensive).

    Returns:
        `[T, H, Dv]`, finite for padding, and the updated states.
    """
    count, heads, value_dim = tokens.v.shape
    size = min(CPU_CHUNK if one_by_one else CHUNK, 1 << (count - 1).bit_length())
    padded = jax.tree.map(lambda a: jnp.pad(a, ((0, size), (0, 0), (0, 0))), tokens)
    chunks = -(-segments.counts // size)
    ends = jnp.cumsum(chunks)

    def cut(start: jax.Array, live: jax.Array) -> Any:
        own = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), padded)
        own = jax.tree.map(lambda a: jnp.where((jnp.arange(size) < live)[:, None, None], a, 0), own)
        return chunk(jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), own))

    chunk_of = partial(_each, cut, segments, size) if one_by_one else _all(cut, segments, size, chunks, ends, count)

    def one_segment(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        outputs, states, state = carry
        fresh = read_slots(states, segments.sources[number][None])[0]
        state = jnp.where(segments.continues[number], state, fresh)

        def one_chunk(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            outputs, state = carry
            made, state = advance(chunk_of(number, index, ends[number] - chunks[number] + index), state)
            # The next segment overwrites outputs beyond the end of this one.
            start = segments.starts[number] + index * size
            return jax.lax.dynamic_update_slice_in_dim(outputs, jnp.swapaxes(made, 0, 1), start, 0), state

        outputs, state = jax.lax.fori_loop(0, chunks[number], one_chunk, (outputs, state))
        target = jnp.where(segments.counts[number] > 0, segments.targets[number], states.shape[0])
        return outputs, write_slots(states, target[None], state[None]), state

    begin = jnp.zeros((count + size, heads, value_dim)), states, jnp.zeros(states.shape[1:])
    last = jnp.max(jnp.where(segments.counts > 0, jnp.arange(chunks.shape[0]) + 1, 0))
    outputs, states, _ = jax.lax.fori_loop(0, last, one_segment, begin)
    return outputs[:count], states


def full_sequences(
    chunk: Chunk, advance: Advance, tokens: Any, states: jax.Array, rows: FullSequences, *, one_by_one: bool
) -> tuple[jax.Array, jax.Array]:
    """Process whole sequences from zero state, in the chunks of `prefill`; the loop length is static, hence
    differentiable.

    Args:
        chunk: state-independent part of the recurrence.
        advance: the rest.
        tokens: tokens of all sequences, concatenated.
        states: returned unchanged.
        rows: length of the sequences.
        one_by_one: selects the chunk size, as in `prefill`.

    Returns:
        `[T, H, Dv]` and the states.
    """
    count, heads, value_dim = tokens.v.shape
    length = rows.length
    size = min(CPU_CHUNK if one_by_one else CHUNK, 1 << (length - 1).bit_length())
    chunks = -(-length // size)

    def cut(a: jax.Array) -> jax.Array:
        """Cut `[T, H, .]` into `[chunks * sequences, H, C, .]`."""
        a = jnp.pad(a.reshape(-1, length, *a.shape[1:]), ((0, 0), (0, chunks * size - length), (0, 0), (0, 0)))
        a = a.reshape(a.shape[0], chunks, size, *a.shape[2:]).transpose(1, 0, 3, 2, 4)
        return a.reshape(-1, *a.shape[2:])

    def one(state: jax.Array, part: Any) -> tuple[jax.Array, jax.Array]:
        made, state = jax.vmap(advance)(part, state)
        return state, made

    # One merged axis: with separate chunk and sequence axes the compiled CPU gradient crashes the process (jax 0.10.2).
    made = chunk(jax.tree.map(cut, tokens))
    made = jax.tree.map(lambda a: a.reshape(chunks, -1, *a.shape[1:]), made)
    _, outputs = jax.lax.scan(one, jnp.zeros((count // length, *states.shape[1:])), made)
    outputs = outputs.transpose(1, 0, 3, 2, 4).reshape(-1, chunks * size, heads, value_dim)
    return outputs[:, :length].reshape(count, heads, value_dim), states


def _each(
    cut: Callable[[jax.Array, jax.Array], Any],
    segments: Segments,
    size: int,
    number: jax.Array,
    index: jax.Array,
    _: jax.Array,
) -> Any:
    """Compute chunk `index` of segment `number`."""
    return cut(segments.starts[number] + index * size, segments.counts[number] - index * size)


def _all(
    cut: Callable[[jax.Array, jax.Array], Any],
    segments: Segments,
    size: int,
    chunks: jax.Array,
    ends: jax.Array,
    count: int,
) -> Callable[[jax.Array, jax.Array, jax.Array], Any]:
    """Compute the chunks of all segments at once; return a function that looks up one by its number."""
    at = jnp.arange(count // size + chunks.shape[0])
    own = jnp.minimum(jnp.searchsorted(ends, at, side="right", method="compare_all"), chunks.shape[0] - 1)
    first = (at - (ends - chunks)[own]) * size
    made = jax.vmap(cut)(segments.starts[own] + first, segments.counts[own] - first)

    def look_up(_number: jax.Array, _index: jax.Array, place: jax.Array) -> Any:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, place, keepdims=False), made)

    return look_up
