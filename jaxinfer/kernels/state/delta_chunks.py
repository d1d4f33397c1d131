"""Gated delta rule over chunks of tokens, by matmuls (arXiv:2406.06484); `kernels.state.delta` defines it.

`prefill` computes runs of tokens of several sequences, `full_sequences` whole sequences, differentiably. Within a chunk
that starts from state S, the updates u of its tokens solve

    (1 + A) U = beta (V - K^ S),  A_ij = beta_i sum_d k_id k_jd exp(g_j+1 + ... + g_i)_d  for j < i

All computations are in float32. Axes: H heads, C tokens of a chunk.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.kernels.state import loops
from jaxinfer.kernels.state.delta import Tokens
from jaxinfer.kernels.state.loops import dot


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


prefill = partial(loops.prefill, _chunk, _advance)
"""Runs of tokens of several sequences, each from its own state (`kernels.state.loops.prefill`)."""
full_sequences = partial(loops.full_sequences, _chunk, _advance)
"""Whole sequences, differentiably (`kernels.state.loops.full_sequences`)."""
