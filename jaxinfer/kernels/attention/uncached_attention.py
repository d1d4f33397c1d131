"""Attention within whole sequences of equal length, without a cache: plain jnp, and therefore differentiable."""

import jax
import jax.numpy as jnp

from jaxinfer.kernels.attention.paged import KVCache, Scoring, Slots
from jaxinfer.kernels.state.slots import FullSequences


def prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    kv_cache: KVCache,
    slots: Slots | None,
    step: FullSequences,
    scoring: Scoring,
    sinks: jax.Array | None = None,
    *,
    tile: int,
) -> tuple[jax.Array, KVCache]:
    """Attend causally within each sequence: softmax(score(q K^T)) V.

    Args:
        q: `[T, H, D]`, with the sequences concatenated.
        k: `[T, K, D]`.
        v: `[T, K, Dv]`; None if the values are the first `scoring.value_dim` columns of the keys.
        kv_cache: returned unchanged.
        slots: ignored.
        step: length of the sequences.
        scoring: scale, window, softcap.
        sinks: attention sink logit per head, `[H]`.
        tile: ignored.

    Returns:
        `[T, H, Dv]` and `kv_cache`.
    """
    length, kv_heads = step.length, k.shape[1]
    v = k[..., : scoring.value_dim] if v is None else v
    keys, values = (a.reshape(-1, length, *a.shape[1:]) for a in (k, v))
    queries = q.reshape(-1, length, kv_heads, q.shape[1] // kv_heads, q.shape[2])
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("bqkgd,bskd->bkgqs", queries, keys, precision=precision, preferred_element_type=jnp.float32)
    at = jnp.arange(length)
    seen = (at <= at[:, None]) & (at >= scoring.first_key(at)[:, None])
    scores = jnp.where(seen, scoring.cap(scoring.scale * scores), -jnp.inf)
    if sinks is not None:
        extra = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(kv_heads, -1, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, extra], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :length].astype(values.dtype)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights, values, precision=precision, preferred_element_type=jnp.float32)
    return out.reshape(*q.shape[:2], -1).astype(q.dtype), kv_cache
