"""Self-attention over the paged cache, and the context of a step that it reads."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.kernels import attention
from jaxinfer.kernels.paged import DecodeRows, Lane, PrefillTiles, Scoring, Slots
from jaxinfer.kv.groups import Place
from jaxinfer.kv.spec import Full, Sliding
from jaxinfer.layers.heads import HeadLayout
from jaxinfer.layers.linear import FusedLinear, RowLinear
from jaxinfer.layers.norms import RMSNorm
from jaxinfer.layers.params import Build
from jaxinfer.layers.rope import apply_rope
from jaxinfer.sharding import axes


class GroupStep(NamedTuple):
    """Where the tokens of one step stand in the cache of one group of layers."""

    slots: Slots
    """Where each token's keys and values go."""
    rows: DecodeRows | PrefillTiles
    """Block tables, and which tokens read which."""


@partial(jax.tree_util.register_dataclass, data_fields=["positions", "rope_lengths", "groups"],
         meta_fields=["mesh", "kernel", "tile", "items", "places"])  # fmt: skip
@dataclass(frozen=True)
class StepContext:
    """Where the tokens of one step stand; a layer takes what `of` gives for it."""

    positions: jax.Array
    """`[T]` position of each token in its sequence; 0 for padding."""
    rope_lengths: jax.Array
    """`[T]` the sequence length that rope's frequencies follow (`layers.rope.cos_sin`)."""
    groups: tuple[GroupStep, ...]
    """One a group of layers; one alone where a layer has it."""
    mesh: Mesh = field(metadata={"static": True})
    kernel: str = field(default="xla", metadata={"static": True})
    """Which implementation attends (`kernels.attention.choose`)."""
    tile: int = field(default=1, metadata={"static": True})
    """Queries a prefill tile holds at most."""
    items: int | None = field(default=None, metadata={"static": True})
    """Work items that decode has room for (`kernels.xla_attention.decode`)."""
    places: tuple[Place, ...] = field(default=(), metadata={"static": True})
    """Group and lane of every layer."""

    @property
    def slots(self) -> Slots:
        """Of a layer's group."""
        return self.groups[0].slots

    @property
    def rows(self) -> DecodeRows | PrefillTiles:
        """Of a layer's group."""
        return self.groups[0].rows

    def lane(self, layer: int) -> int:
        """Which of the lanes is the layer's, maybe with layers of other groups."""
        return self.places[layer].lane

    def of(self, layer: int) -> "StepContext":
        """As the layer sees it."""
        return replace(self, groups=(self.groups[self.places[layer].group],), places=())


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array | None, lane: Lane, step: StepContext, scoring: Scoring,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, Lane]:  # fmt: skip
    """Writes the step's keys and values to the lane, then attends.

    On local shapes in `jax.shard_map`: the fast gather of the cache adds all-gathers under Auto axes.

    Args:
        q: `[T, tp, H / tp, D]`.
        k: `[T, tp, K / tp, D]`.
        v: `[T, tp, K / tp, Dv]`; None where the values are columns of the keys.
        lane: `[N, K, P, D]` keys and values, divided on K.
        step: positions, slots and tables.
        scoring: scale, window, softcap.
        sinks: `[tp, H / tp]` a logit a head beside the keys'.

    Returns:
        `[T, tp, H / tp, Dv]` and the lane as it now is.
    """
    kernel = attention.implementation(step.kernel, step.mesh)

    def local(
        q: jax.Array, k: jax.Array, v: jax.Array | None, lane: Lane, sinks: jax.Array | None, step: StepContext
    ) -> tuple[jax.Array, Lane]:
        q, k, v, sinks = q[:, 0], k[:, 0], None if v is None else v[:, 0], None if sinks is None else sinks[0]
        if isinstance(step.rows, DecodeRows):
            out, lane = kernel.decode(q, k, v, lane, step.slots, step.rows, scoring, sinks, items=step.items)
        else:
            out, lane = kernel.prefill(q, k, v, lane, step.slots, step.rows, scoring, sinks, tile=step.tile)
        return out[:, None], lane

    if step.mesh.size == 1:
        return local(q, k, v, lane, sinks, step)
    heads, first, whole = PartitionSpec(None, axes.MODEL), PartitionSpec(axes.MODEL), PartitionSpec()
    if q.shape[1] == 1:  # the layer is replicated: every device computes all heads
        heads = first = whole
    return jax.shard_map(
        local, mesh=step.mesh, in_specs=(heads, heads, heads, heads, first, whole), out_specs=(heads, heads),
        check_vma=False,
    )(q, k, v, lane, sinks, step)  # fmt: skip


@dataclass(frozen=True)
class AttentionSpec:
    """The shape of one self-attention layer."""

    width: int
    """M."""
    heads: int
    """H."""
    kv_heads: int
    """K; divides H."""
    head_dim: int
    """D, apart from M / H."""
    qkv_bias: bool = False
    out_bias: bool = False
    norm_eps: float | None = None
    """Epsilon of a per-head RMSNorm on queries and keys; None: there is none."""
    window: int | None = None
    """Positions a token sees, itself included; None: all before it."""


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions."""

    placed_whole = True
    """Its parts are divided alike (`models.loading.placeable`)."""

    def __init__(self, build: Build, spec: AttentionSpec):
        self.spec = spec
        self.replicated = build.replicated
        self.layout = HeadLayout.of(build, spec.heads, spec.kv_heads)
        heads = self.layout.outputs(spec.head_dim)
        self.qkv = FusedLinear(build, spec.width, heads, bias=spec.qkv_bias)
        self.out = RowLinear(build, axes.HEADS, heads[0], spec.width, bias=spec.out_bias)
        normed = spec.norm_eps is not None
        self.q_norm = RMSNorm(build, spec.head_dim, spec.norm_eps, axes.HEAD_DIM) if normed else None
        self.k_norm = RMSNorm(build, spec.head_dim, spec.norm_eps, axes.HEAD_DIM) if normed else None

    @property
    def cache_spec(self) -> Full:
        """What the layer keeps."""
        spec = Full(self.layout.stored_kv_heads, self.spec.head_dim, self.replicated)
        if self.spec.window is None:
            return spec
        return Sliding(spec.kv_heads, spec.head_dim, spec.replicated, window=self.spec.window)

    def __call__(
        self, x: jax.Array, lane: Lane, rope: tuple[jax.Array, jax.Array], step: StepContext
    ) -> tuple[jax.Array, Lane]:
        """`[T, M]` -> `[T, M]` and the lane with this step's keys and values in it."""
        q, k, v = (y.reshape(*y.shape[:2], -1, self.spec.head_dim) for y in self.qkv(x))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        y, lane = attend(q, k, v, lane, step, Scoring(self.spec.head_dim**-0.5, self.spec.window))
        return self.out(y.reshape(*y.shape[:2], -1)), lane
