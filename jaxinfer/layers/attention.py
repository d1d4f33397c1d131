"""Self-attention over the paged cache, and the context of a step that it reads."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention.paged import DecodeRows, Lane, PrefillTiles, Scoring, Slots
from jaxinfer.kernels.state.slots import DecodeSlots, Segments, Whole
from jaxinfer.kv.groups import Place
from jaxinfer.kv.spec import Full, Sliding
from jaxinfer.layers.heads import HeadLayout
from jaxinfer.layers.linear import FusedLinear, Output, RowLinear
from jaxinfer.layers.norms import RMSNorm, Scaling, normalise_together
from jaxinfer.layers.params import Build, constant
from jaxinfer.layers.rope import apply_rope, deinterleave
from jaxinfer.layers.sharded import model_axis, on_shards
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ALL_REDUCE, Collective


class GroupStep(NamedTuple):
    """Where the tokens of one step stand in the cache of one group of layers."""

    slots: Slots | None
    """Where each token's keys and values go; None: they are those of an encoder, and there already."""
    rows: DecodeRows | PrefillTiles | Whole
    """Block tables, and which tokens read which."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "real", "rope_lengths", "groups", "seen", "states"],
    meta_fields=["mesh", "kernel", "tile", "items", "places"],
)
@dataclass(frozen=True)
class StepContext:
    """Where the tokens of one step stand; a layer takes what `of` gives for it."""

    positions: jax.Array
    """`[T]` position of each token in its sequence; 0 for padding."""
    real: jax.Array
    """`[T]` bool: which are tokens, and not padding."""
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
    states: DecodeSlots | Segments | Whole | None = None
    """Which slots recurrent layers read and write."""
    seen: jax.Array | None = None
    """`[T, 2]` int32 in a model with cross-attention: the first and the end of the encoder positions that each token
    sees; (0, 0): none, what attention to them gives is 0."""

    @property
    def slots(self) -> Slots | None:
        """Of a layer's group."""
        return self.groups[0].slots

    @property
    def rows(self) -> DecodeRows | PrefillTiles | Whole:
        """Of a layer's group."""
        return self.groups[0].rows

    def lane(self, layer: int) -> int:
        """Which of the lanes is the layer's, maybe with layers of other groups."""
        return self.places[layer].lane

    def of(self, layer: int) -> "StepContext":
        """As the layer sees it."""
        group = self.places[layer].group
        return replace(self, groups=() if group < 0 else (self.groups[group],), places=())


def attend(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    lane: Lane,
    step: StepContext,
    scoring: Scoring,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, Lane]:
    """Writes the step's keys and values to the lane, if it has any of its own, then attends.

    On local shapes in `jax.shard_map`: the fast gather of the cache adds all-gathers under Auto axes.

    Args:
        q: `[T, tp, H / tp, D]`.
        k: `[T, tp, K / tp, D]`; None where all keys are in the lane (cross-attention).
        v: `[T, tp, K / tp, Dv]`; None where there are no keys, or the values are columns of them.
        lane: `[N, K, P, D]` keys and values, divided on K.
        step: positions, slots and tables.
        scoring: scale, window, softcap.
        sinks: `[tp, H / tp]` a logit a head beside the keys'.

    Returns:
        `[T, tp, H / tp, Dv]` and the lane as it now is.
    """
    kernel = attention.implementation(step.kernel, step.mesh)

    def local(
        q: jax.Array, k: jax.Array | None, v: jax.Array | None, lane: Lane, sinks: jax.Array | None, step: StepContext
    ) -> tuple[jax.Array, Lane]:
        q, k, v = (None if x is None else x[:, 0] for x in (q, k, v))
        sinks = None if sinks is None else sinks[0]
        if isinstance(step.rows, DecodeRows):
            out, lane = kernel.decode(q, k, v, lane, step.slots, step.rows, scoring, sinks, items=step.items)
        else:
            out, lane = kernel.prefill(q, k, v, lane, step.slots, step.rows, scoring, sinks, tile=step.tile)
        return out[:, None], lane

    model = model_axis(q.shape[1])
    heads, specs = PartitionSpec(None, model), (PartitionSpec(model), PartitionSpec())
    return on_shards(local, step.mesh, (*[heads] * 4, *specs), (heads, heads), q, k, v, lane, sinks, step)


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
    qkv_bias: bool | tuple[str, ...] = False
    """Whether there is one, or the names of those of "q", "k" and "v" that have one."""
    out_bias: bool = False
    norm_eps: float | None = None
    """Epsilon of an RMSNorm on queries and keys; None: there is none."""
    norm_whole: bool = False
    """Whether it is over the width of all heads together; False: over each head's."""
    norm_scaling: Scaling = Scaling()
    window: int | None = None
    """Positions a token sees, itself included; None: all before it."""
    scale: float | None = None
    """Multiplies the scores; None: D ** -0.5."""
    softcap: float | None = None
    """`kernels.paged.Scoring.softcap`."""
    gated: bool = False
    """Whether what a head attends to is multiplied by a sigmoid, whose columns are beside its queries
    (arXiv:2505.06708)."""
    interleaved: bool = False
    """Whether rope rotates columns 2i and 2i + 1 of a head against each other (GPT-J, Cohere); False: i and i + R/2."""
    sinks: bool = False
    """Whether each head has a logit beside those of the keys, which takes part of their weight (arXiv:2309.17453)."""

    @property
    def scoring(self) -> Scoring:
        """How scores are made."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return Scoring(scale, self.window, self.softcap)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245), with rotary positions where the model has them."""

    placed_whole = True
    """Its parts are divided alike (`loading.weights.placeable`)."""

    def __init__(self, build: Build, spec: AttentionSpec):
        self.spec = spec
        self.replicated = build.replicated
        self.layout = HeadLayout.of(build, spec.heads, spec.kv_heads)
        heads = self.layout.outputs(spec.head_dim)
        queries = replace(heads[0], width=2 * spec.head_dim) if spec.gated else heads[0]
        self.qkv = FusedLinear(build, spec.width, (queries, *heads[1:]), bias=spec.qkv_bias)
        self.out = RowLinear(build, axes.HEADS, heads[0], spec.width, bias=spec.out_bias)
        normed, scaling = spec.norm_eps is not None, spec.norm_scaling
        each = normed and not spec.norm_whole
        self.q_norm = RMSNorm(build, spec.head_dim, spec.norm_eps, axes.HEAD_DIM, scaling) if each else None
        self.k_norm = RMSNorm(build, spec.head_dim, spec.norm_eps, axes.HEAD_DIM, scaling) if each else None
        # Of queries and of keys, one after the other, divided as their columns are.
        whole = normed and spec.norm_whole
        self.norm_scale = _by_columns(build, heads[:2], 1.0 - scaling.offset) if whole else None
        self.sinks = _by_columns(build, (replace(heads[0], name="sinks", width=1),), 0.0) if spec.sinks else None

    @property
    def cache_spec(self) -> Full:
        """What the layer keeps."""
        spec = Full(self.layout.stored_kv_heads, self.spec.head_dim, self.replicated)
        if self.spec.window is None:
            return spec
        return Sliding(spec.kv_heads, spec.head_dim, spec.replicated, window=self.spec.window)

    def __call__(
        self, x: jax.Array, lane: Lane, rope: tuple[jax.Array, jax.Array] | None, step: StepContext
    ) -> tuple[jax.Array, Lane]:
        """`[T, M]` -> `[T, M]` and the lane with this step's keys and values in it; `rope` None: positions are not its
        affair."""
        q, k, v = self.qkv(x)
        if self.norm_scale is not None:
            q, k = self._normalise(q, k, step.mesh)
        q, k, v = (y.reshape(*y.shape[:2], -1, self.spec.head_dim) for y in (q, k, v))
        gate = None
        if self.spec.gated:
            q, gate = q[:, :, ::2], q[:, :, 1::2]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            if self.spec.interleaved:
                q, k = deinterleave(q), deinterleave(k)
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        sinks = None if self.sinks is None else self.sinks[...]
        y, lane = attend(q, k, v, lane, step, self.spec.scoring, sinks)
        if gate is not None:
            y = y * jax.nn.sigmoid(gate)
        return self.out(y.reshape(*y.shape[:2], -1)), lane

    def _normalise(self, q: jax.Array, k: jax.Array, mesh: Mesh) -> tuple[jax.Array, ...]:
        """`[T, tp, columns]` of both, each over its whole width."""
        shards, layout = q.shape[1], self.layout
        # Where a kv head serves several shards its columns are in the sum once for each.
        copies = max(1, shards // layout.stored_kv_heads)
        widths = [layout.heads * self.spec.head_dim, copies * layout.kv_heads * self.spec.head_dim]
        local = partial(
            normalise_together,
            widths=widths,
            eps=self.spec.norm_eps,
            over=None if shards == 1 else axes.MODEL,
            scaling=self.spec.norm_scaling,
        )
        if shards == 1:  # a replicated layer computes alike on every device without a `shard_map`
            return local((q, k), self.norm_scale[...])
        divided = PartitionSpec(None, axes.MODEL)
        specs = (divided, divided), PartitionSpec(axes.MODEL)
        return on_shards(local, mesh, specs, (divided, divided), (q, k), self.norm_scale[...])

    def collectives(self) -> list[Collective]:
        """That of a norm whose width is divided."""
        if self.norm_scale is None or self.norm_scale.shape[0] == 1:
            return []
        return [Collective(ALL_REDUCE, "squares of q and k", 2, itemsize=4)]


def _by_columns(build: Build, outputs: tuple[Output, ...], value: float) -> nnx.Param:
    """`[tp, columns]`: a number for each column of these outputs, which lie as they do."""
    shape = build.tp, sum(output.columns(build.tp) for output in outputs)
    return constant(build, shape, (axes.SHARD, axes.COLUMNS), value, outputs=outputs)
