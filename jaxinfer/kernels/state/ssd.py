"""State space duality, the recurrence of Mamba-2 (arXiv:2405.21060): linear attention with a decay for each head.

The state of a head is a matrix S `[Dk, Dv]`, initially zero. A token with query q (C of the paper), key k (B), value v
(x dt) and log-decay g <= 0 (A dt) computes

    S <- exp(g) S + k v^T;  o = S^T q

Heads of a group share queries and keys, which are not repeated: a chunk multiplies them once for all heads of a group.

All computations are in float32. Axes: G groups, H heads, a multiple of G; C tokens of a chunk.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.kernels.state import loops
from jaxinfer.kernels.state.loops import dot


class Tokens(NamedTuple):
    """Inputs of the recurrence per token, float32; leading axes may precede those named."""

    q: jax.Array
    """`[T, G, Dk]`."""
    k: jax.Array
    """`[T, G, Dk]`."""
    v: jax.Array
    """`[T, H, Dv]`."""
    g: jax.Array
    """`[T, H, 1]`; at most 0."""


def recurrence(tokens: Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reference implementation, token by token: outputs `[T, H, Dv]` and the final state `[H, Dk, Dv]`."""
    group = tokens.v.shape[1] // tokens.k.shape[1]

    def one(state: jax.Array, token: Tokens) -> tuple[jax.Array, jax.Array]:
        q, k = (jnp.repeat(x, group, axis=0) for x in token[:2])
        state = jnp.exp(token.g)[..., None] * state + k[:, :, None] * token.v[:, None, :]
        return state, dot("hkv,hk->hv", state, q)

    state, outputs = jax.lax.scan(one, state, tokens)
    return outputs, state


def _step(tokens: Tokens, states: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Process one token for each state `[B, H, Dk, Dv]`: outputs `[B, H, Dv]` and the new states.

    Outputs are sums over the new state, in one pass. A product with the old one, or any matrix product, makes XLA on a
    CPU copy the states of all slots, twice for each token (jax 0.10.2: 466 against 24 ms for 8 sequences of 64 slots).
    """
    q, k, v, g = tokens
    group = v.shape[1] // k.shape[1]
    q, k = (jnp.repeat(x, group, axis=1) for x in (q, k))
    states = states * jnp.exp(g)[..., None] + k[..., None] * v[..., None, :]
    return jnp.sum(q[..., None] * states, axis=-2), states


decode = partial(loops.decode, _step)
"""One token per sequence (`kernels.state.loops.decode`)."""
prefill_steps = partial(loops.prefill_steps, _step)
"""Runs of tokens, one at a time (`kernels.state.loops.prefill_steps`)."""


class _Chunk(NamedTuple):
    """State-independent part of a chunk."""

    q: jax.Array
    """`[G, C, Dk]`."""
    k: jax.Array
    """`[G, C, Dk]`."""
    local: jax.Array
    """`[H, C, Dv]`, what outputs read of the chunk's own tokens."""
    start: jax.Array
    """`[H, C, 1]`, decay from the chunk's start through each token."""
    values: jax.Array
    """`[H, C, Dv]`, decayed to the chunk's end."""
    decay: jax.Array
    """`[H, 1, 1]`, decay over the whole chunk."""


def _sums(g: jax.Array) -> jax.Array:
    """Sum log-decays `[..., C]` over (j, i] for -1 <= j <= i: `[..., C, C + 1]` by i and j + 1, 0 for j > i.

    As a product with the terms of each sum, as differences of sums from the start would cancel.
    """
    at = jnp.arange(g.shape[-1])
    after = at[:, None] > jnp.arange(-1, g.shape[-1])
    until = (at[None, :] <= at[:, None]).astype(jnp.float32)
    return dot("it,...tj->...ij", until, jnp.where(after, g[..., None], 0))


def _chunk(tokens: Tokens) -> _Chunk:
    """Compute the state-independent part of chunks: q and k `[..., G, C, Dk]`, v `[..., H, C, Dv]`."""
    q, k, v, g = tokens
    size, groups = k.shape[-2], k.shape[-3]
    sums = _sums(g[..., 0])
    decays = jnp.where(jnp.tri(size, dtype=bool), jnp.exp(sums[..., 1:]), 0)
    scores = dot("...ck,...dk->...cd", q, k)
    # [..., G, H / G, C, C] times scores of the group
    weights = decays.reshape(*decays.shape[:-3], groups, -1, size, size) * scores[..., None, :, :]
    local = dot("...cd,...dv->...cv", weights.reshape(decays.shape), v)
    start, end = jnp.exp(sums[..., :1]), jnp.exp(sums[..., -1, 1:])[..., None]
    return _Chunk(q, k, local, start, v * end, start[..., -1:, :])


def _advance(chunk: _Chunk, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Apply a chunk to the state `[H, Dk, Dv]`: outputs `[H, C, Dv]` and the new state."""
    by_group = chunk.k.shape[0], -1
    found = dot("gck,ghkv->ghcv", chunk.q, state.reshape(*by_group, *state.shape[1:]))
    added = dot("gck,ghcv->ghkv", chunk.k, chunk.values.reshape(*by_group, *chunk.values.shape[1:]))
    outputs = chunk.local + chunk.start * found.reshape(chunk.local.shape)
    return outputs, chunk.decay * state + added.reshape(state.shape)


prefill = partial(loops.prefill, _chunk, _advance)
"""Runs of tokens of several sequences, each from its own state (`kernels.state.loops.prefill`)."""
full_sequences = partial(loops.full_sequences, _chunk, _advance)
"""Whole sequences, differentiably (`kernels.state.loops.full_sequences`)."""
