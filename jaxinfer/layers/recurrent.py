"""Shared parts of layers with a recurrent state: their convolution, and running on the local shapes of each device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.kernels.attention import choose
from jaxinfer.kernels.state import short_conv
from jaxinfer.kernels.state.slots import DecodeSlots, FullSequences, Segments, StepSegments
from jaxinfer.kernels.triton import triton_launch
from jaxinfer.kv.spec import State, StateArray
from jaxinfer.layers.linear import Output
from jaxinfer.layers.params import Build, weight
from jaxinfer.layers.sharded import model_axis, on_shards
from jaxinfer.sharding import axes

Rows: TypeAlias = DecodeSlots | Segments | FullSequences
"""Tokens of a step, and the state slots it reads and writes for them."""

CONVOLUTIONS: Mapping[type, Callable[..., Any]] = {
    DecodeSlots: short_conv.decode,
    Segments: short_conv.prefill,
    StepSegments: short_conv.prefill,
    FullSequences: short_conv.full_sequences,
}
"""Convolution for each type of rows."""


@dataclass(frozen=True)
class Way:
    """Implementation of a recurrence for a device."""

    one_by_one: bool
    """Whether to loop over sequences and chunks, as suits a CPU (`kernels.state.loops.prefill`)."""
    target: triton_launch.Target | None = None
    """The GPU to compute on with Triton's kernels; None for XLA's operations."""

    def run(
        self,
        kernels: Mapping[type, Callable[..., Any]],
        triton: Mapping[type, Callable[..., Any]],
        tokens: Any,
        state: jax.Array,
        rows: Rows,
    ) -> tuple[jax.Array, jax.Array]:
        """Run a recurrence; return outputs `[T, H, Dv]` and the updated state of all slots.

        Args:
            kernels: XLA's implementations for each type of rows.
            triton: those of NVIDIA GPUs.
            tokens: inputs of the recurrence.
            state: state of all slots.
            rows: state slots the step reads and writes.
        """
        if self.target is not None and type(rows) in triton:
            return triton[type(rows)](tokens, state, rows, self.target)
        return kernels[type(rows)](tokens, state, rows, one_by_one=self.one_by_one)


class RecurrentState(NamedTuple):
    """State arrays of one layer by slot, or their shapes (`kv.spec.State`) or partition specs (shard_map)."""

    recurrent: Any
    """State of the recurrence `[N, H, Dk, Dv]` float32, sharded on H."""
    conv: Any
    """Last convolution inputs `[N, W - 1, columns]`, sharded on columns; the columns of a shard are contiguous."""


def state_spec(heads: tuple[int, int, int], taps: int, columns: int, dtype: jnp.dtype, *, replicated: bool) -> State:
    """Return the cache spec of a recurrence after a convolution.

    Args:
        heads: H, Dk and Dv.
        taps: W.
        columns: columns of the convolution, over all shards.
        dtype: that of activations, in which convolution inputs are stored.
        replicated: whether every device computes the whole layer.
    """
    recurrent = StateArray(heads, (axes.HEADS, axes.HEAD_DIM, axes.HEAD_DIM), jnp.dtype("float32"))
    conv = StateArray((taps - 1, columns), (None, axes.HEADS), jnp.dtype(dtype))
    return State(RecurrentState(recurrent, conv), replicated)


def convolve(columns: jax.Array, weight: jax.Array, state: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Convolve `[T, columns]` with `[columns, W]`: float32 `[T, columns]` and the updated inputs of all slots."""
    return CONVOLUTIONS[type(rows)](columns, weight, state, rows)


def convolution(build: Build, outputs: Sequence[Output], taps: int) -> nnx.Param:
    """Make the weight of a convolution `[tp, columns, 1, W]`, shaped as in checkpoints and sharded like its inputs."""
    columns = sum(output.columns(build.tp) for output in outputs)
    shape, names = (build.tp, columns, 1, taps), (axes.SHARD, axes.COLUMNS, None, None)
    return weight(build, shape, names, taps**-0.5, outputs=tuple(outputs))


def run_on_shards(
    local: Callable[..., tuple[jax.Array, Any]],
    mesh: Mesh,
    kernel: str,
    spec: State,
    by_token: tuple[jax.Array, ...],
    by_shard: Any,
    whole: Any,
    state: Any,
    rows: Rows,
) -> tuple[jax.Array, Any]:
    """Call `local(by_token, by_shard, whole, state, rows, way)` with the local arrays of each shard.

    Args:
        local: returns `[T, 1, columns]` and the state.
        mesh: the devices.
        kernel: implementation of attention (`kernels.attention.choose`), which selects that of the recurrence.
        spec: the layer's cache spec, whose axes `heads` are sharded.
        by_token: activations `[T, tp, ...]`; `local` gets `[T, ...]`.
        by_shard: pytree of parameters `[tp, ...]`; `local` gets `[...]`.
        whole: replicated parameters.
        state: state of all slots.
        rows: state slots the step reads and writes.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    way = Way(on_cpu, triton_launch.target(mesh) if kernel == choose.TRITON else None)

    def inside(
        by_token: tuple[jax.Array, ...], by_shard: Any, whole: Any, state: Any, rows: Rows
    ) -> tuple[jax.Array, Any]:
        own = tuple(a[:, 0] for a in by_token), jax.tree.map(lambda a: a[0], by_shard)
        return local(*own, whole, state, rows, way)

    model = model_axis(by_token[0].shape[1])
    tokens = PartitionSpec(None, model)
    places = (PartitionSpec(None, *(model if name == axes.HEADS else None for name in a.axes)) for a in spec.arrays)
    states = type(spec.arrays)(*places)
    specs = tokens, PartitionSpec(model), PartitionSpec(), states, PartitionSpec()
    return on_shards(inside, mesh, specs, (tokens, states), by_token, by_shard, whole, state, rows)
