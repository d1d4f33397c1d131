"""Mamba-2 (arXiv:2405.21060) as in Granite 4, Bamba, Falcon H1 and Nemotron-H.

All input projections are one GEMM, `z x b c dt`: gate, values, keys, queries and time steps. x, b and c pass a short
convolution. Heads are sharded with their groups of keys and queries; a group that several shards need is repeated. Of
each layer the only collective is the output's all-reduce, and a small one where the gated norm spans several shards.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.kernels.state import ssd, triton_ssd
from jaxinfer.kernels.state.slots import DecodeSlots, FullSequences, Segments, StepSegments
from jaxinfer.kv.spec import State
from jaxinfer.layers.attending import AttentionModule
from jaxinfer.layers.linear import FusedLinear, Output, RowLinear, by_columns
from jaxinfer.layers.norms import scale_by
from jaxinfer.layers.params import Build, param
from jaxinfer.layers.recurrent import RecurrentState, Rows, Way, convolution, convolve, run_on_shards, state_spec
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ALL_REDUCE, Collective

KERNELS: Mapping[type, Callable[..., Any]] = {
    DecodeSlots: ssd.decode,
    Segments: ssd.prefill,
    StepSegments: ssd.prefill_steps,
    FullSequences: ssd.full_sequences,
}
"""The recurrence for each type of rows."""

TRITON: Mapping[type, Callable[..., Any]] = {
    DecodeSlots: triton_ssd.decode,
    Segments: triton_ssd.prefill,
    StepSegments: triton_ssd.prefill_steps,
}
"""The same on NVIDIA GPUs. Whole sequences are for training, and differentiable."""


@dataclass(frozen=True)
class MambaSpec:
    """Configuration of a Mamba-2 layer."""

    width: int
    """M."""
    heads: int
    """H."""
    head_dim: int
    """Dv: columns of a head."""
    groups: int
    """G: groups of heads that share keys and queries; divides H."""
    state_dim: int
    """Dk: columns of keys and queries."""
    taps: int
    """W: positions of the convolution, at least 2."""
    conv_bias: bool = True
    in_bias: bool = False
    """Whether the input projections have biases."""
    out_bias: bool = False
    norm_eps: float | None = 1e-5
    """Epsilon of the RMSNorm over each group's columns; None for no norm."""
    gate_first: bool = True
    """Whether the gate is applied before that norm."""
    multipliers: tuple[float, ...] | None = None
    """Factors on the outputs z, x, b, c and dt of the input projections (Falcon H1); None for 1."""

    @property
    def projected(self) -> tuple[Output, ...]:
        """Outputs of the input projections: z, x, b, c and dt."""
        b, c = (Output(name, self.groups, self.state_dim, repeat=True) for name in "bc")
        z, x = (Output(name, self.heads, self.head_dim) for name in "zx")
        return z, x, b, c, Output("dt", self.heads)


class Mamba(AttentionModule):
    """Mamba-2 layer."""

    no_split = True
    """A placement shards or replicates all parts together (`loading.weights.placeable`)."""

    def __init__(self, build: Build, spec: MambaSpec):
        """Create the layer.

        Raises:
            ConfigError: the heads do not divide over the shards, nor the groups over them or they over the groups.
        """
        self.spec, self.mesh, self.dtype, self.replicated = spec, build.mesh, build.dtype, build.replicated
        self.tp = build.tp
        self.projection = FusedLinear(build, spec.width, spec.projected, bias=spec.in_bias)
        values, convolved = spec.projected[1], spec.projected[1:4]
        self.conv = convolution(build, convolved, spec.taps)
        self.conv_bias = by_columns(build, convolved, 0.0) if spec.conv_bias else None
        self.columns = build.tp * self.conv.shape[1]
        self.decay, self.step_bias, self.skip = (
            param(build, jnp.full((spec.heads,), value), (axes.HEADS,)) for value in (0.0, 0.0, 1.0)
        )
        self.norm = None if spec.norm_eps is None else by_columns(build, (values,), 1.0)
        self.out = RowLinear(build, axes.HEADS, values, spec.width, bias=spec.out_bias)

    @property
    def cache_spec(self) -> State:
        """Cache spec of the layer; each shard has its own copy of a repeated group."""
        heads = self.spec.heads, self.spec.state_dim, self.spec.head_dim
        return state_spec(heads, self.spec.taps, self.columns, self.dtype, replicated=self.replicated)

    def __call__(self, x: jax.Array, state: RecurrentState, rows: Rows) -> tuple[jax.Array, RecurrentState]:
        """Map `[T, M]` to `[T, M]` and the state after the step's tokens."""
        by_token = self.projection(x)
        if self.spec.multipliers is not None:
            by_token = tuple(scale_by(y, own) for y, own in zip(by_token, self.spec.multipliers, strict=True))
        optional = {"conv_bias": self.conv_bias, "norm": self.norm}
        by_shard = {
            "conv": self.conv[...][:, :, 0],
            **{name: own[...].reshape(self.tp, -1) for name, own in self._by_head().items()},
            **{name: own[...] for name, own in optional.items() if own is not None},
        }
        y, state = run_on_shards(
            self._local, self.mesh, self.attention_kernel, self.cache_spec, by_token, by_shard, None, state, rows
        )
        return self.out(y), state

    def _by_head(self) -> dict[str, Any]:
        return {"decay": self.decay, "step_bias": self.step_bias, "skip": self.skip}

    def _local(
        self,
        by_token: tuple[jax.Array, ...],
        by_shard: dict[str, jax.Array],
        _whole: None,
        state: RecurrentState,
        rows: Rows,
        way: Way,
    ) -> tuple[jax.Array, RecurrentState]:
        """Compute `[T, 1, H Dv]` for the local heads."""
        z, x, b, c, dt = by_token
        columns, count = jnp.concatenate([x, b, c], axis=-1), x.shape[0]
        y, conv = convolve(columns, by_shard["conv"], state.conv, rows)
        if self.conv_bias is not None:
            y = y + by_shard["conv_bias"].astype(y.dtype)
        ends = x.shape[1], x.shape[1] + b.shape[1]
        x, b, c = (part.reshape(count, -1, size) for part, size in self._sized(jnp.split(jax.nn.silu(y), ends, -1)))
        dt = jax.nn.softplus(dt.astype(jnp.float32) + by_shard["step_bias"])[..., None]
        tokens = ssd.Tokens(c, b, x * dt, -jnp.exp(by_shard["decay"])[:, None] * dt)
        y, recurrent = way.run(KERNELS, TRITON, tokens, state.recurrent, rows)
        y = (y + by_shard["skip"][:, None] * x).reshape(count, -1)
        y = self._gated(y, z.astype(jnp.float32), by_shard.get("norm"))
        return y.astype(columns.dtype)[:, None], RecurrentState(recurrent, conv)

    def _sized(self, parts: list[jax.Array]) -> list[tuple[jax.Array, int]]:
        """Return x, b and c with the columns of a head or group."""
        return list(zip(parts, (self.spec.head_dim, self.spec.state_dim, self.spec.state_dim), strict=True))

    def _gated(self, y: jax.Array, z: jax.Array, scale: jax.Array | None) -> jax.Array:
        """Apply the gate and, with a scale, the RMSNorm over each group's columns, to float32 `[T, columns]`."""
        gate = jax.nn.silu(z)
        if scale is None:
            return y * gate
        y = y * gate if self.spec.gate_first else y
        by_group = y.reshape(y.shape[0], -(-self.spec.groups // self.tp), -1)
        squares = jnp.sum(by_group * by_group, axis=-1)
        if self._norm_spans_shards:
            own = jax.lax.axis_index(axes.MODEL) * self.spec.groups // self.tp
            every = jax.lax.psum(squares * (jnp.arange(self.spec.groups) == own), axes.MODEL)
            squares = jax.lax.dynamic_slice_in_dim(every, own, 1, axis=1)
        width = self.spec.heads * self.spec.head_dim // self.spec.groups
        normed = (by_group * jax.lax.rsqrt(squares / width + self.spec.norm_eps)[..., None]).reshape(y.shape)
        y = normed * scale.astype(jnp.float32)
        return y if self.spec.gate_first else y * gate

    @property
    def _norm_spans_shards(self) -> bool:
        return self.norm is not None and self.tp > self.spec.groups

    def collectives(self) -> list[Collective]:
        """Return the all-reduce of the gated norm if a group's columns are on several shards."""
        if not self._norm_spans_shards:
            return []
        return [Collective(ALL_REDUCE, "squares of the gated norm", self.spec.groups, itemsize=4)]
