"""Gated DeltaNet (arXiv:2412.06464) as in Qwen3-Next: one decay per head, several value heads per key head.

`in_proj_qkvz` and `in_proj_ba` are one GEMM. Checkpoint rows are grouped by key head, each with its query, key, values
and gates, so the rows of a shard are contiguous in the checkpoint.
"""

import jax
import jax.numpy as jnp

from jaxinfer.kv.spec import State
from jaxinfer.layers.attending import AttentionModule
from jaxinfer.layers.delta import DeltaSpec, DeltaState, Rows, Way, gated_norm, run, run_on_shards
from jaxinfer.layers.linear import FusedLinear, Output, RowLinear
from jaxinfer.layers.params import Build, constant, param, weight
from jaxinfer.sharding import axes


class DeltaNetSpec(DeltaSpec):
    """Configuration of a gated DeltaNet layer."""


class GatedDeltaNet(AttentionModule):
    """Gated DeltaNet layer; the number of value heads is a multiple of the number of key heads."""

    no_split = True
    """A placement shards or replicates all parts together (`loading.weights.placeable`)."""

    def __init__(self, build: Build, spec: DeltaSpec):
        """Create the layer.

        Raises:
            ConfigError: the key heads do not divide over the shards; this layer does not pad heads.
        """
        self.spec, self.mesh, self.dtype, self.replicated = spec, build.mesh, build.dtype, build.replicated
        self.group = spec.value_heads // spec.key_heads
        a_head = 2 * spec.key_dim + 2 * self.group * spec.value_dim
        outputs = Output("qkvz", spec.key_heads, a_head), Output("ba", spec.key_heads, 2 * self.group)
        self.projection = FusedLinear(build, spec.width, outputs)
        columns = sum(output.columns(build.tp) for output in spec.convolved)
        # Same shape as the convolution weight in the checkpoint.
        shape, names = (build.tp, columns, 1, spec.taps), (axes.SHARD, axes.COLUMNS, None, None)
        self.conv = weight(build, shape, names, spec.taps**-0.5, outputs=spec.convolved)
        self.decay = param(build, jnp.zeros((spec.value_heads,)), (axes.HEADS,))
        self.decay_bias = param(build, jnp.zeros((spec.value_heads,)), (axes.HEADS,))
        self.norm = constant(build, (spec.value_dim,), (axes.HEAD_DIM,), 1.0)
        self.out = RowLinear(build, axes.HEADS, Output("v", spec.value_heads, spec.value_dim), spec.width)

    @property
    def cache_spec(self) -> State:
        """Cache spec of the layer."""
        return self.spec.cache_spec(self.dtype, self.replicated)

    def __call__(self, x: jax.Array, state: DeltaState, rows: Rows) -> tuple[jax.Array, DeltaState]:
        """Map `[T, M]` to `[T, M]` and the state after the step's tokens."""
        by_token = self.projection(x)
        tp = by_token[0].shape[1]
        by_shard = self.conv[...][:, :, 0], self.decay[...].reshape(tp, -1), self.decay_bias[...].reshape(tp, -1)
        y, state = run_on_shards(
            self._local, self.mesh, self.attention_kernel, by_token, by_shard, self.norm[...], state, rows
        )
        return self.out(y), state

    def _local(
        self,
        by_token: tuple[jax.Array, ...],
        by_shard: tuple[jax.Array, ...],
        norm: jax.Array,
        state: DeltaState,
        rows: Rows,
        way: Way,
    ) -> tuple[jax.Array, DeltaState]:
        """Compute `[T, 1, H Dv]` for the local heads."""
        (qkvz, ba), (conv, decay, bias) = by_token, by_shard
        spec, count, values = self.spec, qkvz.shape[0], self.group * self.spec.value_dim
        heads = decay.shape[0] // self.group
        ends = spec.key_dim, 2 * spec.key_dim, 2 * spec.key_dim + values
        q, k, v, z = (y.reshape(count, -1) for y in jnp.split(qkvz.reshape(count, heads, -1), ends, axis=-1))
        b, a = (y.reshape(count, -1).astype(jnp.float32) for y in jnp.split(ba.reshape(count, heads, -1), 2, axis=-1))
        g = -jnp.exp(decay) * jax.nn.softplus(a + bias)
        columns = jnp.concatenate([q, k, v], axis=-1)
        y, state = run(columns, conv, g[..., None], jax.nn.sigmoid(b), spec, state, rows, way)
        y = gated_norm(y, z.reshape(y.shape), norm, spec.norm_eps, jax.nn.silu)
        return y.astype(columns.dtype).reshape(count, 1, -1), state
