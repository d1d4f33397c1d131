"""Kimi Delta Attention (arXiv:2510.26692): linear attention with a per-channel decay of the state.

Six projections of the input are one GEMM, `q k v b | f_a g_a`: the first four sharded by heads, the two low-rank ones
replicated. The two projections of the low-rank outputs are one batched GEMM (SGLang #17801). The only collective is the
all-reduce of the output projection.
"""

import jax
import jax.numpy as jnp

from jaxinfer.kv.spec import State
from jaxinfer.layers.attending import AttentionModule
from jaxinfer.layers.delta import DeltaSpec, gated_norm, run
from jaxinfer.layers.linear import BatchedLinear, FusedLinear, Output, RowLinear
from jaxinfer.layers.params import Build, constant, param
from jaxinfer.layers.recurrent import RecurrentState, Rows, Way, convolution, run_on_shards
from jaxinfer.sharding import axes


class KdaSpec(DeltaSpec):
    """Configuration of a Kimi Delta Attention layer."""


class KimiDeltaAttention(AttentionModule):
    """Kimi Delta Attention layer; q, k and v have equal heads and head dims (`spec.key_heads == spec.value_heads`)."""

    no_split = True
    """A placement shards or replicates all parts together (`loading.weights.placeable`)."""

    def __init__(self, build: Build, spec: DeltaSpec):
        """Create the layer.

        Raises:
            ConfigError: the heads do not divide over the shards; this layer does not pad heads.
        """
        heads, dim = spec.value_heads, spec.value_dim
        self.spec, self.mesh, self.dtype, self.replicated = spec, build.mesh, build.dtype, build.replicated
        low_rank = Output("f_a", 1, dim, sharded=False), Output("g_a", 1, dim, sharded=False)
        self.projection = FusedLinear(build, spec.width, (*spec.convolved, Output("b", heads), *low_rank))
        self.gates = BatchedLinear(build, dim, (Output("f_b", heads, dim), Output("g_b", heads, dim)))
        self.conv = convolution(build, spec.convolved, spec.taps)
        self.decay = param(build, jnp.zeros((1, 1, heads, 1)), (None, None, axes.HEADS, None))
        self.decay_bias = param(build, jnp.zeros((heads * dim,)), (axes.HEADS,))
        self.norm = constant(build, (dim,), (axes.HEAD_DIM,), 1.0)
        self.out = RowLinear(build, axes.HEADS, Output("v", heads, dim), spec.width)

    @property
    def cache_spec(self) -> State:
        """Cache spec of the layer."""
        return self.spec.cache_spec(self.dtype, self.replicated)

    def __call__(self, x: jax.Array, state: RecurrentState, rows: Rows) -> tuple[jax.Array, RecurrentState]:
        """Map `[T, M]` to `[T, M]` and the state after the step's tokens."""
        q, k, v, b, f, g = self.projection(x)
        forget, gate = self.gates(f, g)
        tp, dim = q.shape[1], self.spec.value_dim
        by_token = jnp.concatenate([q, k, v], axis=-1), b, *(y.reshape(*y.shape[:2], -1, dim) for y in (forget, gate))
        by_shard = self.conv[...][:, :, 0], self.decay[...].reshape(tp, -1), self.decay_bias[...].reshape(tp, -1, dim)
        y, state = run_on_shards(
            self._local,
            self.mesh,
            self.attention_kernel,
            self.cache_spec,
            by_token,
            by_shard,
            self.norm[...],
            state,
            rows,
        )
        return self.out(y), state

    def _local(
        self,
        by_token: tuple[jax.Array, ...],
        by_shard: tuple[jax.Array, ...],
        norm: jax.Array,
        state: RecurrentState,
        rows: Rows,
        way: Way,
    ) -> tuple[jax.Array, RecurrentState]:
        """Compute `[T, 1, H Dv]` for the local heads."""
        (columns, b, forget, gate), (conv, decay, bias) = by_token, by_shard
        g = -jnp.exp(decay)[:, None] * jax.nn.softplus(forget.astype(jnp.float32) + bias)
        beta = jax.nn.sigmoid(b.astype(jnp.float32))
        y, state = run(columns, conv, g, beta, self.spec, state, rows, way)
        y = gated_norm(y, gate, norm, self.spec.norm_eps, jax.nn.sigmoid)
        return y.astype(columns.dtype).reshape(y.shape[0], 1, -1), state
