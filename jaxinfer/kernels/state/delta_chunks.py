"""Gated delta rule over chunks of tokens, by matmuls (arXiv:2406.06484); `kernels.state.delta` defines it.

`prefill` computes runs of tokens of several sequences, `full_sequences` whole sequences, differentiably. Within a chunk
that starts from state S, the updates u of its tokens solve

    (1 + A) U = beta (V - K^ S),  A_ij = beta_i sum_d k_id k_jd exp(g_j+1 + ... + g_i)_d  for j < i

All computations are in float32. Axes: H heads, C tokens of a chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.kernels.state.delta import Tokens, dot
from jaxinfer.kernels.state.slots import FullSequences, Segments
from jaxinfer.kernels.state.slots import read as read_slots
from jaxinfer.kernels.state.slots import write as write_slots

CHUNK, CPU_CHUNK = 64, 32
"""Maximum tokens of a prefill chunk; powers of two. On a CPU 32 was faster than 64, whose last chunks have more
padding: 16 heads of 128 channels take 19 against 23 ms for one segment of 512 tokens, 20 against 37 for 16 of 32 (jax
0.12, two cores with other work on them). The GPU value is estimated, not measured."""


class _Chunk(NamedTuple):
    """State-independent part of a chunk."""

    reads: jax.Array
    """`[H, 2 C, Dk]`, multiplied with the state: keys times beta, then queries, both decayed from the chunk's start."""
    values: jax.Array
    """`[H, C, Dv]`, values times beta."""
    inverse: jax.Array
    """`[H, C, C]`, inverse of 1 + A."""
    weights: jax.Array
    """`[H, C, C]`, weight of each token's update in its own and later outputs."""
    keys: jax.Array
    """`[H, C, Dk]`, keys decayed to the chunk's end."""
    decay: jax.Array
    """`[H, Dk or 1, 1]`, decay over the whole chunk."""


def _pairs(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Compute row products `[..., m, D]`, `[..., n, D]` -> `[..., m, n]`.

    Few rows are multiplied elementwise, as each matmul costs a library call.
    """
    if columns.shape[-2] < 8:
        return jnp.sum(rows[..., :, None, :] * columns[..., None, :, :], axis=-1)
    return dot("...md,...nd->...mn", rows, columns)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply `[..., m, n]` and `[..., n, p]`; small matrices elementwise as in `_pairs`."""
    if b.shape[-2] < 8:
        return jnp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)
    return dot("...mn,...np->...mp", a, b)


def _block_lower_triangular(first: jax.Array, corner: jax.Array, second: jax.Array) -> jax.Array:
    """Assemble `[[first, 0], [corner, second]]` from matrices `[..., n, n]`."""
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _chunk(tokens: Tokens) -> _Chunk:
    """Compute the state-independent part of chunks `[..., H, C, .]`, C a power of two.

    Adjacent parts of 1, 2, 4, ... tokens are merged. The decay between two parts is the decay to the end of the first
    times the decay from the start of the second, both products of numbers in [0, 1]: nothing overflows or cancels,
    however strong the decay. The inverse of a merged part follows from those of its two halves: [[X, 0], [-Y B X, Y]].
    """
    q, k, v, g, beta = tokens
    size = q.shape[-2]

    def split(a: jax.Array, parts: int) -> jax.Array:
        return a.reshape(*a.shape[:-2], parts, size // parts, a.shape[-1])

    inverse, weights = jnp.ones_like(split(beta, size)), split(jnp.sum(q * k, axis=-1, keepdims=True), size)
    before = split(jnp.exp(g), size)  # decay from the part's start through each token
    after = jnp.ones_like(before)  # decay after each token to the part's end
    parts = size
    while parts > 1:
        (b1, b2), (a1, a2), (x, y), (w1, w2) = (
            (a[..., ::2, :, :], a[..., 1::2, :, :]) for a in (before, after, inverse, weights)
        )
        q2, k2, beta2 = (split(a, parts)[..., 1::2, :, :] for a in (q, k, beta))
        rows = jnp.concatenate([k2 * (beta2 * b2), q2 * b2], axis=-2)
        found = _pairs(rows, split(k, parts)[..., ::2, :, :] * a1)
        half = found.shape[-1]
        inverse = _block_lower_triangular(x, -_matmul(_matmul(y, found[..., :half, :]), x), y)
        weights = _block_lower_triangular(w1, found[..., half:, :], w2)
        # A part's total decay is the one through its last token.
        before = jnp.concatenate([b1, b1[..., -1:, :] * b2], axis=-2)
        after = jnp.concatenate([a1 * b2[..., -1:, :], a2], axis=-2)
        parts //= 2
    start, end, inverse, weights = (a[..., 0, :, :] for a in (before, after, inverse, weights))
    reads = jnp.concatenate([k * (beta * start), q * start], axis=-2)
    return _Chunk(reads, beta * v, inverse, weights, k * end, jnp.swapaxes(start[..., -1:, :], -1, -2))


def _advance(chunk: _Chunk, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Apply a chunk to the state `[H, Dk, Dv]`: outputs `[H, C, Dv]` and the new state."""
    size = chunk.values.shape[-2]
    found = dot("hck,hkv->hcv", chunk.reads, state)
    updates = dot("hij,hjv->hiv", chunk.inverse, chunk.values - found[:, :size])
    outputs = found[:, size:] + dot("hij,hjv->hiv", chunk.weights, updates)
    return outputs, chunk.decay * state + dot("hck,hcv->hkv", chunk.keys, updates)


def prefill(tokens: Tokens, states: jax.Array, segments: Segments, *, one_by_one: bool) -> tuple[jax.Array, jax.Array]:
    """Process runs of tokens of several sequences, each from its own state.

    Chunks are aligned to the start of each segment, so that a segment's result does not depend on other segments, and
    NaN does not spread to other segments.

    Args:
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

    def cut(start: jax.Array, live: jax.Array) -> _Chunk:
        own = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), padded)
        own = jax.tree.map(lambda a: jnp.where((jnp.arange(size) < live)[:, None, None], a, 0), own)
        return _chunk(jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), own))

    chunk_of = partial(_each, cut, segments, size) if one_by_one else _all(cut, segments, size, chunks, ends, count)

    def one_segment(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        outputs, states, state = carry
        fresh = read_slots(states, segments.sources[number][None])[0]
        state = jnp.where(segments.continues[number], state, fresh)

        def one_chunk(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            outputs, state = carry
            made, state = _advance(chunk_of(number, index, ends[number] - chunks[number] + index), state)
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
    tokens: Tokens, states: jax.Array, rows: FullSequences, *, one_by_one: bool
) -> tuple[jax.Array, jax.Array]:
    """Process whole sequences from zero state, in the chunks of `prefill`; the loop length is static, hence
    differentiable.

    Args:
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

    def one(state: jax.Array, chunk: _Chunk) -> tuple[jax.Array, jax.Array]:
        made, state = jax.vmap(_advance)(chunk, state)
        return state, made

    # One merged axis: with separate chunk and sequence axes the compiled CPU gradient crashes the process (jax 0.10.2).
    made = _chunk(jax.tree.map(cut, tokens))
    made = jax.tree.map(lambda a: a.reshape(chunks, -1, *a.shape[1:]), made)
    _, outputs = jax.lax.scan(one, jnp.zeros((count // length, *states.shape[1:])), made)
    outputs = outputs.transpose(1, 0, 3, 2, 4).reshape(-1, chunks * size, heads, value_dim)
    return outputs[:, :length].reshape(count, heads, value_dim), states


def _each(
    cut: Callable[[jax.Array, jax.Array], _Chunk],
    segments: Segments,
    size: int,
    number: jax.Array,
    index: jax.Array,
    _: jax.Array,
) -> _Chunk:
    """Compute chunk `index` of segment `number`."""
    return cut(segments.starts[number] + index * size, segments.counts[number] - index * size)


def _all(
    cut: Callable[[jax.Array, jax.Array], _Chunk],
    segments: Segments,
    size: int,
    chunks: jax.Array,
    ends: jax.Array,
    count: int,
) -> Callable[[jax.Array, jax.Array, jax.Array], _Chunk]:
    """Compute the chunks of all segments at once; return a function that looks up one by its number."""
    at = jnp.arange(count // size + chunks.shape[0])
    own = jnp.minimum(jnp.searchsorted(ends, at, side="right", method="compare_all"), chunks.shape[0] - 1)
    first = (at - (ends - chunks)[own]) * size
    made = jax.vmap(cut)(segments.starts[own] + first, segments.counts[own] - first)

    def look_up(_number: jax.Array, _index: jax.Array, place: jax.Array) -> _Chunk:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, place, keepdims=False), made)

    return look_up
