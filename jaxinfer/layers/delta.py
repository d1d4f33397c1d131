"""Shared parts of linear-attention layers: their state, and convolution and delta rule on local shapes.

Axes beside those of `sharding.axes`: H value heads, K query and key heads, Dk and Dv their head dims, W convolution
taps, N state slots.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.kernels.attention import choose
from jaxinfer.kernels.state import delta, delta_chunks, short_conv, triton_delta
from jaxinfer.kernels.state.slots import DecodeSlots, FullSequences, Segments, StepSegments
from jaxinfer.kernels.triton import triton_launch
from jaxinfer.kv.spec import State, StateArray
from jaxinfer.layers.linear import Output
from jaxinfer.layers.sharded import model_axis, on_shards
from jaxinfer.sharding import axes

EPS = 1e-6
"""Epsilon of the l2 norm of queries and keys."""

Rows: TypeAlias = DecodeSlots | Segments | FullSequences
"""Tokens of a step, and the state slots it reads and writes for them."""

KERNELS: Mapping[type, tuple[Callable[..., Any], Callable[..., Any]]] = {
    DecodeSlots: (short_conv.decode, delta.decode),
    Segments: (short_conv.prefill, delta_chunks.prefill),
    StepSegments: (short_conv.prefill, delta.prefill_steps),
    FullSequences: (short_conv.full_sequences, delta_chunks.full_sequences),
}
"""Convolution and delta-rule kernels for each type of rows."""

TRITON: Mapping[type, Callable[..., Any]] = {
    DecodeSlots: triton_delta.decode,
    Segments: triton_delta.prefill,
    StepSegments: triton_delta.prefill_steps,
}
"""Delta-rule kernels on NVIDIA GPUs. Whole sequences are for training, and differentiable."""


@dataclass(frozen=True)
class Way:
    """How the delta rule is computed on the devices at hand."""

    one_by_one: bool
    """Whether to loop over sequences and chunks, as suits a CPU (`kernels.state.delta_chunks.prefill`)."""
    target: triton_launch.Target | None = None
    """The GPU to compute on with Triton's kernels; None for XLA's operations."""

    def attend(self, tokens: delta.Tokens, state: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
        """Return `[T, H, Dv]` and the updated state of all slots."""
        if self.target is not None and type(rows) in TRITON:
            return TRITON[type(rows)](tokens, state, rows, self.target)
        return KERNELS[type(rows)][1](tokens, state, rows, one_by_one=self.one_by_one)


class DeltaState(NamedTuple):
    """State arrays of one layer by slot, or their shapes (`kv.spec.State`) or partition specs (shard_map)."""

    recurrent: Any
    """Delta-rule state `[N, H, Dk, Dv]` float32, sharded on H."""
    conv: Any
    """Last convolution inputs `[N, W - 1, columns]`, sharded on columns; the columns of a shard are contiguous."""


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
        heads, names = (self.value_heads, self.key_dim, self.value_dim), (axes.HEADS, axes.HEAD_DIM, axes.HEAD_DIM)
        recurrent = StateArray(heads, names, jnp.dtype("float32"))
        conv = StateArray((self.taps - 1, columns), (None, axes.HEADS), jnp.dtype(dtype))
        return State(DeltaState(recurrent, conv), replicated)


def run(
    columns: jax.Array,
    weight: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    spec: DeltaSpec,
    state: DeltaState,
    rows: Rows,
    way: Way,
) -> tuple[jax.Array, DeltaState]:
    """Apply convolution, l2 norms and delta rule: everything between a layer's projections, on local shapes.

    Args:
        columns: `[T, columns]` q, k and v of this shard.
        weight: `[columns, W]`.
        g: `[T, H, Dk]` or `[T, H, 1]` float32 log-decays.
        beta: `[T, H]` float32.
        spec: the layer; the number of local heads is derived from the shapes.
        state: this shard's state.
        rows: state slots the step reads and writes.
        way: how the delta rule is computed.

    Returns:
        `[T, H, Dv]` float32 and the updated state.
    """
    y, conv = KERNELS[type(rows)][0](columns, weight, state.conv, rows)
    here, group = g.shape[1], spec.value_heads // spec.key_heads
    keys = here // group * spec.key_dim
    q, k = (part.reshape(-1, here // group, spec.key_dim) for part in (y[:, :keys], y[:, keys : 2 * keys]))
    q, k = delta.normalise(q, EPS) * spec.key_dim**-0.5, delta.normalise(k, EPS)
    q, k = (jnp.repeat(part, group, axis=1) for part in (q, k))
    tokens = delta.Tokens(q, k, y[:, 2 * keys :].reshape(-1, here, spec.value_dim), g, beta[..., None])
    out, recurrent = way.attend(tokens, state.recurrent, rows)
    return out, DeltaState(recurrent, conv)


def gated_norm(
    x: jax.Array, gate: jax.Array, scale: jax.Array, eps: float, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Compute `x / sqrt(mean(x^2) + eps) * scale * activation(gate)` over the last axis, in float32."""
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * scale.astype(jnp.float32) * activation(gate.astype(jnp.float32))


def run_on_shards(
    local: Callable[..., tuple[jax.Array, DeltaState]],
    mesh: Mesh,
    kernel: str,
    by_token: tuple[jax.Array, ...],
    by_shard: tuple[jax.Array, ...],
    whole: Any,
    state: DeltaState,
    rows: Rows,
) -> tuple[jax.Array, DeltaState]:
    """Call `local(by_token, by_shard, whole, state, rows, way)` with the local arrays of each shard.

    Args:
        local: returns `[T, 1, columns]` and the state.
        mesh: the devices.
        kernel: implementation of attention (`kernels.attention.choose`), which is followed here.
        by_token: activations `[T, tp, ...]`; `local` gets `[T, ...]`.
        by_shard: parameters `[tp, ...]`; `local` gets `[...]`.
        whole: replicated parameters.
        state: state of all slots.
        rows: state slots the step reads and writes.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    way = Way(on_cpu, triton_launch.target(mesh) if kernel == choose.TRITON else None)

    def inside(
        by_token: tuple[jax.Array, ...],
        by_shard: tuple[jax.Array, ...],
        whole: Any,
        state: DeltaState,
        rows: Rows,
    ) -> tuple[jax.Array, DeltaState]:
        own = tuple(a[:, 0] for a in by_token), tuple(a[0] for a in by_shard)
        return local(*own, whole, state, rows, way)

    model = model_axis(by_token[0].shape[1])
    tokens, states = (
        PartitionSpec(None, model),
        DeltaState(PartitionSpec(None, model), PartitionSpec(None, None, model)),
    )
    specs = tokens, PartitionSpec(model), PartitionSpec(), states, PartitionSpec()
    return on_shards(inside, mesh, specs, (tokens, states), by_token, by_shard, whole, state, rows)
