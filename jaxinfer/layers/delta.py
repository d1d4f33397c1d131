"""Shared parts of linear-attention layers: their state, and convolution and delta rule on local shapes.

Axes beside those of `sharding.axes`: H value heads, K query and key heads, Dk and Dv their head dims, W convolution
taps, N state slots.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.kernels.state import delta, delta_chunks, triton_delta
from jaxinfer.kernels.state.slots import DecodeSlots, FullSequences, Segments, StepSegments
from jaxinfer.kv.spec import State
from jaxinfer.layers.linear import Output
from jaxinfer.layers.recurrent import RecurrentState, Rows, Way, convolve, state_spec

EPS = 1e-6
"""Epsilon of the l2 norm of queries and keys."""

KERNELS: Mapping[type, Callable[..., Any]] = {
    DecodeSlots: delta.decode,
    Segments: delta_chunks.prefill,
    StepSegments: delta.prefill_steps,
    FullSequences: delta_chunks.full_sequences,
}
"""Delta-rule kernels for each type of rows."""

TRITON: Mapping[type, Callable[..., Any]] = {
    DecodeSlots: triton_delta.decode,
    Segments: triton_delta.prefill,
    StepSegments: triton_delta.prefill_steps,
}
"""The same on NVIDIA GPUs. Whole sequences are for training, and differentiable."""


@dataclass(frozen=True)
class DeltaSpec:
    """Configuration of a linear-attention layer."""

    width: int
    """M."""
    key_heads: int
    """K; divides H."""
    key_dim: int
    """Dk."""
    value_heads: int
    """H."""
    value_dim: int
    """Dv."""
    taps: int
    """W."""
    norm_eps: float

    @property
    def convolved(self) -> tuple[Output, Output, Output]:
        """Columns of the convolution: q, k and v, each sharded by heads."""
        return (
            Output("q", self.key_heads, self.key_dim),
            Output("k", self.key_heads, self.key_dim),
            Output("v", self.value_heads, self.value_dim),
        )

    def cache_spec(self, dtype: jnp.dtype, replicated: bool) -> State:
        """Return the cache spec; `dtype` is that of activations, in which convolution inputs are stored."""
        columns = sum(output.rows for output in self.convolved)
        heads = self.value_heads, self.key_dim, self.value_dim
        return state_spec(heads, self.taps, columns, dtype, replicated=replicated)


def run(
    columns: jax.Array,
    weight: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    spec: DeltaSpec,
    state: RecurrentState,
    rows: Rows,
    way: Way,
) -> tuple[jax.Array, RecurrentState]:
    """Apply convolution, l2 norms and delta rule: everything between a layer's projections, on local shapes.

    Args:
        columns: `[T, columns]` q, k and v of this shard.
        weight: `[columns, W]`.
        g: `[T, H, Dk]` or `[T, H, 1]` float32 log-decays.
        beta: `[T, H]` float32.
        spec: the layer; the number of local heads is derived from the shapes.
        state: this shard's state.
        rows: state slots the step reads and writes.
        way: implementation of the recurrence.

    Returns:
        `[T, H, Dv]` float32 and the updated state.
    """
    y, conv = convolve(columns, weight, state.conv, rows)
    y = jax.nn.silu(y)
    here, group = g.shape[1], spec.value_heads // spec.key_heads
    keys = here // group * spec.key_dim
    q, k = (part.reshape(-1, here // group, spec.key_dim) for part in (y[:, :keys], y[:, keys : 2 * keys]))
    q, k = delta.normalise(q, EPS) * spec.key_dim**-0.5, delta.normalise(k, EPS)
    q, k = (jnp.repeat(part, group, axis=1) for part in (q, k))
    tokens = delta.Tokens(q, k, y[:, 2 * keys :].reshape(-1, here, spec.value_dim), g, beta[..., None])
    out, recurrent = way.run(KERNELS, TRITON, tokens, state.recurrent, rows)
    return out, RecurrentState(recurrent, conv)


def gated_norm(
    x: jax.Array, gate: jax.Array, scale: jax.Array, eps: float, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Compute `x / sqrt(mean(x^2) + eps) * scale * activation(gate)` over the last axis, in float32."""
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * scale.astype(jnp.float32) * activation(gate.astype(jnp.float32))
