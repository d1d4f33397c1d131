"""Gated delta rule: Kimi Delta Attention (arXiv:2510.26692), gated DeltaNet (arXiv:2412.06464).

The state of a head is a matrix S `[Dk, Dv]`, initially zero. A token with query q, key k, value v, log-decay g <= 0
(per key channel in KDA, per head in gated DeltaNet) and strength beta computes

    S <- diag(exp g) S;  S <- S + beta k (v - S^T k)^T;  o = S^T q

`recurrence` is this definition, token by token; `decode` is one step for many sequences; `prefill_steps` takes one step
a token, so that its bits do not depend on where chunks begin. `kernels.state.delta_chunks` computes chunks of tokens.

All computations are in float32. Axes: H heads (value heads; the caller repeats queries and keys).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.kernels.state.slots import DecodeSlots, Segments
from jaxinfer.kernels.state.slots import read as read_slots
from jaxinfer.kernels.state.slots import write as write_slots

dot = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
"""Einsum at full precision."""


class Tokens(NamedTuple):
    """Inputs of the delta rule per token, float32; leading axes may precede those named."""

    q: jax.Array
    """`[T, H, Dk]`, already scaled."""
    k: jax.Array
    """`[T, H, Dk]`."""
    v: jax.Array
    """`[T, H, Dv]`."""
    g: jax.Array
    """`[T, H, Dk]`, or `[T, H, 1]` if all channels of a head have the same decay; at most 0."""
    beta: jax.Array
    """`[T, H, 1]`."""


def normalise(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Compute `x / sqrt(sum x^2 + eps)` over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)


def recurrence(tokens: Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reference implementation, token by token: outputs `[T, H, Dv]` and the final state `[H, Dk, Dv]`."""

    def one(state: jax.Array, token: Tokens) -> tuple[jax.Array, jax.Array]:
        q, k, v, g, beta = token
        state = state * jnp.exp(g)[..., None]
        update = beta * (v - dot("hkv,hk->hv", state, k))
        state = state + k[..., None] * update[..., None, :]
        return state, dot("hkv,hk->hv", state, q)

    state, outputs = jax.lax.scan(one, state, tokens)
    return outputs, state


def _step(tokens: Tokens, states: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Process one token for each state `[B, H, Dk, Dv]`: outputs `[B, H, Dv]` and the new states.

    S^T k and S^T q are both computed from the old state: S'^T q = S^T (exp(g) q) + (q k) u.
    """
    q, k, v, g, beta = tokens
    decay = jnp.exp(g)
    found = dot("bhxk,bhkv->bhxv", jnp.stack([k * decay, q * decay], axis=-2), states)
    update = beta * (v - found[..., 0, :])
    outputs = found[..., 1, :] + jnp.sum(q * k, axis=-1, keepdims=True) * update
    return outputs, states * decay[..., None] + k[..., None] * update[..., None, :]


def decode(tokens: Tokens, states: jax.Array, rows: DecodeSlots, *, one_by_one: bool) -> tuple[jax.Array, jax.Array]:
    """Process one token per sequence.

    Args:
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
        outputs, new = _step(tokens, states.at[sources].get(mode="clip"))
        return outputs, write_slots(states, targets, new)

    def one(row: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        outputs, states = carry
        source, target = jnp.minimum(sources[row], count - 1), jnp.minimum(targets[row], count - 1)
        old = jax.lax.dynamic_slice_in_dim(states, source, 1)
        output, new = _step(jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, row, 1), tokens), old)
        # Padding has equal source and target, which is left unchanged.
        new = jnp.where(targets[row] < count, new, old)
        states = jax.lax.dynamic_update_slice_in_dim(states, new, target, 0)
        return jax.lax.dynamic_update_slice_in_dim(outputs, output, row, 0), states

    return jax.lax.fori_loop(0, sources.shape[0], one, (jnp.zeros_like(tokens.v), states))


def prefill_steps(
    tokens: Tokens, states: jax.Array, segments: Segments, *, one_by_one: bool
) -> tuple[jax.Array, jax.Array]:
    """Process runs of tokens as `delta_chunks.prefill`, one token at a time by the same operation on the state.

    The state after a token then has the same bits wherever chunks and segments begin, which no chunked form has. On a
    CPU it takes 1.6 times as long as chunks (16 heads of 128 channels).

    Args:
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
            made, state = _step(jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, at, 1), tokens), state)
            return jax.lax.dynamic_update_slice_in_dim(outputs, made, at, 0), state

        outputs, state = jax.lax.fori_loop(start, start + segments.counts[number], one_token, (outputs, state))
        target = jnp.where(segments.counts[number] > 0, segments.targets[number], states.shape[0])
        return outputs, write_slots(states, target[None], state), state

    begin = jnp.zeros_like(tokens.v), states, jnp.zeros((1, *states.shape[1:]))
    last = jnp.max(jnp.where(segments.counts > 0, jnp.arange(segments.counts.shape[0]) + 1, 0))
    outputs, states, _ = jax.lax.fori_loop(0, last, one_segment, begin)
    return outputs, states
