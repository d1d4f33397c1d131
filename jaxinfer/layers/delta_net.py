"""Gated DeltaNet (arXiv:2412.06464) as in Qwen3-Next and Qwen3.5: one decay a head, several value heads a key head.

All input projections are one GEMM. Qwen3-Next's checkpoints group the rows by key head, each with its query, key,
values and gates (`in_proj_qkvz`, `in_proj_ba`); Qwen3.5's store each output by itself.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinfer.kv.spec import State
from jaxinfer.layers.attending import AttentionModule
from jaxinfer.layers.delta import DeltaSpec, gated_norm, run
from jaxinfer.layers.linear import FusedLinear, Output, RowLinear
from jaxinfer.layers.params import Build, constant, param
from jaxinfer.layers.recurrent import RecurrentState, Rows, Way, convolution, run_on_shards
from jaxinfer.sharding import axes


@dataclass(frozen=True)
class DeltaNetSpec(DeltaSpec):
    """Configuration of a gated DeltaNet layer."""

    grouped: bool = True
    """Whether the rows of the input projections are grouped by key head (Qwen3-Next)."""

    @property
    def projected(self) -> tuple[Output, ...]:
        """Outputs of the input projections, sharded by heads."""
        if not self.grouped:
            z = Output("z", self.value_heads, self.value_dim)
            return (*self.convolved, z, *(Output(name, self.value_heads, 1) for name in "ba"))
        group = self.value_heads // self.key_heads
        a_head = 2 * self.key_dim + 2 * group * self.value_dim
        return Output("qkvz", self.key_heads, a_head), Output("ba", self.key_heads, 2 * group)


class GatedDeltaNet(AttentionModule):
    """Gated DeltaNet layer; the number of value heads is a multiple of the number of key heads."""

    no_split = True
    """A placement shards or replicates all parts together (`loading.weights.placeable`)."""

    def __init__(self, build: Build, spec: DeltaNetSpec):
        """Create the layer.

        Raises:
            ConfigError: the key heads do not divide over the shards; this layer does not pad heads.
        """
        self.spec, self.mesh, self.dtype, self.replicated = spec, build.mesh, build.dtype, build.replicated
        self.group = spec.value_heads // spec.key_heads
        self.projection = FusedLinear(build, spec.width, spec.projected)
        self.conv = convolution(build, spec.convolved, spec.taps)
        self.decay = param(build, jnp.zeros((spec.value_heads,)), (axes.HEADS,))
        self.decay_bias = param(build, jnp.zeros((spec.value_heads,)), (axes.HEADS,))
        self.norm = constant(build, (spec.value_dim,), (axes.HEAD_DIM,), 1.0)
        self.out = RowLinear(build, axes.HEADS, Output("v", spec.value_heads, spec.value_dim), spec.width)

    @property
    def cache_spec(self) -> State:
        """Cache spec of the layer."""
        return self.spec.cache_spec(self.dtype, self.replicated)

    def __call__(self, x: jax.Array, state: RecurrentState, rows: Rows) -> tuple[jax.Array, RecurrentState]:
        """Map `[T, M]` to `[T, M]` and the state after the step's tokens."""
        by_token = self.projection(x)
        tp = by_token[0].shape[1]
        by_shard = self.conv[...][:, :, 0], self.decay[...].reshape(tp, -1), self.decay_bias[...].reshape(tp, -1)
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
        conv, decay, bias = by_shard
        columns, z, b, a = self._split(by_token, decay.shape[0] // self.group)
        g = -jnp.exp(decay) * jax.nn.softplus(a + bias)
        y, state = run(columns, conv, g[..., None], jax.nn.sigmoid(b), self.spec, state, rows, way)
        y = gated_norm(y, z.reshape(y.shape), norm, self.spec.norm_eps, jax.nn.silu)
        return y.astype(columns.dtype).reshape(columns.shape[0], 1, -1), state

    def _split(self, by_token: tuple[jax.Array, ...], keys: int) -> tuple[jax.Array, ...]:
        """Return q, k and v `[T, columns]`, the output gate `[T, H Dv]`, and float32 b and a `[T, H]`.

        Args:
            by_token: the outputs of the input projections, `[T, columns]` of this shard.
            keys: number of key heads of this shard.
        """
        if self.spec.grouped:
            qkvz, ba = (y.reshape(y.shape[0], keys, -1) for y in by_token)
            spec, values = self.spec, self.group * self.spec.value_dim
            ends = spec.key_dim, 2 * spec.key_dim, 2 * spec.key_dim + values
            parts = *jnp.split(qkvz, ends, axis=-1), *jnp.split(ba, 2, axis=-1)
            by_token = tuple(y.reshape(y.shape[0], -1) for y in parts)
        q, k, v, z, b, a = by_token
        return jnp.concatenate([q, k, v], axis=-1), z, b.astype(jnp.float32), a.astype(jnp.float32)
