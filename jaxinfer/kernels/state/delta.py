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

from jaxinfer.kernels.state import loops
from jaxinfer.kernels.state.loops import dot


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


decode = partial(loops.decode, _step)
"""One token per sequence (`kernels.state.loops.decode`)."""
prefill_steps = partial(loops.prefill_steps, _step)
"""Runs of tokens, one at a time (`kernels.state.loops.prefill_steps`)."""
