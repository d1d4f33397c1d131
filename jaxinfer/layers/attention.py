"""Self-attention over the paged cache, and the per-step context it reads."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.kernels import rowwise
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention import joint
from jaxinfer.kernels.attention.joint import JointRows
from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, PrefillTiles, Scoring, Slots
from jaxinfer.kernels.state.slots import DecodeSlots, FullSequences, Segments
from jaxinfer.kv.groups import Place
from jaxinfer.kv.spec import Full, Lent, Sliding
from jaxinfer.layers.heads import HeadLayout
from jaxinfer.layers.linear import FusedLinear, RowLinear, by_columns
from jaxinfer.layers.norms import RMSNorm, Scaling, normalise, normalise_together
from jaxinfer.layers.params import Build
from jaxinfer.layers.rope import apply_rope, deinterleave
from jaxinfer.layers.sharded import model_axis, on_shards
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ALL_REDUCE, Collective


class Loan(NamedTuple):
    """Keys and values of a step's tokens that a layer lends to later ones (`kv.spec.Lent`)."""

    keys: jax.Array
    """`[T, tp, K / tp, D]`, as they are attended to; likewise `values`."""
    values: jax.Array


class Lending(NamedTuple):
    """What the attention of a layer that lends returns in place of its cache arrays."""

    kv_cache: KVCache
    loan: Loan


class Growth(NamedTuple):
    """Factor by which queries at position p are multiplied: 1 + beta ln(1 + floor((p + ahead) / length))."""

    beta: float
    length: int
    ahead: int = 0
    wide: bool = False
    """Whether queries are multiplied in float32, before rounding; False: by the rounded factor."""

    def __call__(self, q: jax.Array, positions: jax.Array) -> jax.Array:
        """Multiply queries `[T, ...]` at positions `[T]`."""
        growth = 1 + self.beta * jnp.log1p(((positions + self.ahead) // self.length).astype(jnp.float32))
        growth = growth.reshape(-1, *[1] * (q.ndim - 1))
        if self.wide:
            return (q.astype(jnp.float32) * growth).astype(q.dtype)
        return q * growth.astype(q.dtype)


class GroupStep(NamedTuple):
    """Block tables and slots of one step's tokens in one group of layers."""

    slots: Slots | None
    """Slots that each token's keys and values are written to; None for encoder keys, which are already in the cache."""
    rows: DecodeRows | PrefillTiles | JointRows | FullSequences
    """Block tables, and the tokens that read each of them."""

    def part(self, place: Place) -> "GroupStep":
        """Return the step of layers that have a part of each block (`kv.groups`)."""
        if isinstance(self.rows, FullSequences):
            return self
        slots = None if self.slots is None else self.slots._replace(blocks=place.ids(self.slots.blocks))
        return GroupStep(slots, self.rows._replace(tables=place.ids(self.rows.tables)))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "real", "rope_lengths", "groups", "rope_positions", "seen", "states", "routed", "lent"],
    meta_fields=["mesh", "kernel", "tile", "items", "places", "deterministic", "remat"],
)
@dataclass(frozen=True)
class StepContext:
    """Positions, block tables and slots of one step's tokens; each layer uses its own view, `step.of(layer)`."""

    positions: jax.Array
    """Position of each token in its sequence, `[T]` int32; 0 for padding."""
    real: jax.Array
    """`[T]` bool; False for padding."""
    rope_lengths: jax.Array
    """Sequence length that rope frequencies depend on, `[T]` int32 (`layers.rope.cos_sin`)."""
    groups: tuple[GroupStep, ...]
    """One entry per group of layers; a single entry in a layer's view."""
    mesh: Mesh = field(metadata={"static": True})
    kernel: str = field(default="xla", metadata={"static": True})
    """Implementation of attention (`kernels.attention.choose`)."""
    tile: int = field(default=1, metadata={"static": True})
    """Maximum queries per prefill tile."""
    items: int | None = field(default=None, metadata={"static": True})
    """Work items that decode has room for (`kernels.attention.xla_attention.decode`)."""
    places: tuple[Place, ...] = field(default=(), metadata={"static": True})
    """Group and cache array of every layer."""
    rope_positions: jax.Array | None = None
    """With M-RoPE: positions that rope rotates each token by, `[T]` or `[T, 3]` int32; None if they are `positions`."""
    states: DecodeSlots | Segments | FullSequences | None = None
    """State slots that recurrent layers read and write."""
    seen: jax.Array | None = None
    """For models with cross-attention, the start and end of the encoder positions each token sees, `[T, 2]` int32. (0,
    0) means none; cross-attention then returns 0."""
    routed: tuple[jax.Array | None, ...] | None = None
    """Experts `[T, k]` of each layer's tokens, in place of the router's own choice; a single entry in a layer's view.
    None to let routers choose."""
    lent: Loan | None = None
    """Keys and values of the layer whose keys and values this layer attends to; in the view of such a layer."""
    deterministic: bool = field(default=False, metadata={"static": True})
    """Whether each token is computed in the same way whatever else the step has (`functional.Program`)."""
    remat: bool = field(default=False, metadata={"static": True})
    """Training: whether a gradient computes each layer's activations again (`jax.checkpoint`)."""

    @property
    def slots(self) -> Slots | None:
        """Slots of the layer's group; for a layer's view only."""
        return self.groups[0].slots

    @property
    def rows(self) -> DecodeRows | PrefillTiles | JointRows | FullSequences:
        """Rows of the layer's group; for a layer's view only."""
        return self.groups[0].rows

    def array_index(self, layer: int) -> int:
        """Return the index of the layer's cache array, which layers of other groups may share."""
        return self.places[layer].array

    def of(self, layer: int) -> "StepContext":
        """Return the view of one layer."""
        place = self.places[layer]
        routed = None if self.routed is None else (self.routed[layer],)
        groups = () if place.group < 0 else (self.groups[place.group].part(place),)
        return replace(self, groups=groups, places=(), routed=routed)


def attend(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv_cache: KVCache,
    step: StepContext,
    scoring: Scoring,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Write the step's keys and values to the cache, if there are any, and attend.

    Runs on local shapes in `jax.shard_map`: under Auto axes the fast gather of the cache would add all-gathers.

    Args:
        q: `[T, tp, H / tp, D]`.
        k: `[T, tp, K / tp, D]`; None if all keys are in the cache (cross-attention).
        v: `[T, tp, K / tp, Dv]`; None without keys, or if the values are columns of the keys.
        kv_cache: cache arrays `[N, K, P, D]` of keys and values, sharded on K; the layer may see them in another shape
            (`paged.seen_shape`).
        step: positions, slots and block tables.
        scoring: scale, window, softcap.
        sinks: attention sink logit per head, `[tp, H / tp]`.

    Returns:
        `[T, tp, H / tp, Dv]` and the updated cache arrays.
    """
    kernel = attention.implementation(step.kernel, step.mesh, deterministic=step.deterministic)

    def local(
        q: jax.Array,
        k: jax.Array | None,
        v: jax.Array | None,
        kv_cache: KVCache,
        sinks: jax.Array | None,
        step: StepContext,
    ) -> tuple[jax.Array, KVCache]:
        q, k, v = (None if x is None else x[:, 0] for x in (q, k, v))
        sinks = None if sinks is None else sinks[0]
        how = {"scoring": scoring, "sinks": sinks}
        # Some implementations have one of the two only: that of training, and caches of one's own.
        if not isinstance(step.rows, DecodeRows):
            run = prefill = partial(kernel.prefill, tile=step.tile, **how)
        if isinstance(step.rows, DecodeRows | JointRows):
            run = decode = partial(kernel.decode, items=step.items, **how)
        if isinstance(step.rows, JointRows):
            out, kv_cache = joint.attend(prefill, decode, (q, k, v), kv_cache, step.slots, step.rows)
        else:
            out, kv_cache = run(q, k, v, kv_cache, step.slots, step.rows)
        return out[:, None], kv_cache

    model = model_axis(q.shape[1])
    heads, specs = PartitionSpec(None, model), (PartitionSpec(model), PartitionSpec())
    return on_shards(local, step.mesh, (*[heads] * 4, *specs), (heads, heads), q, k, v, kv_cache, sinks, step)


@dataclass(frozen=True)
class AttentionSpec:
    """Configuration of a self-attention layer."""

    width: int
    """M."""
    heads: int
    """H."""
    kv_heads: int
    """K; divides H."""
    head_dim: int
    """D; may differ from M / H."""
    qkv_bias: bool | tuple[str, ...] = False
    """Whether q, k and v have a bias, or the names of those of "q", "k" and "v" that do."""
    out_bias: bool = False
    norm_eps: float | None = None
    """Epsilon of the RMSNorm on queries and keys; None for no norm."""
    norm_whole: bool = False
    """Whether that norm spans all heads together (OLMo); False for a norm per head (Qwen3)."""
    norm_scaling: Scaling = Scaling()
    window: int | None = None
    """Sliding window: positions a token sees, itself included; None for full attention."""
    chunked: bool = False
    """Whether the window is one of chunks side by side (`kernels.attention.paged.Scoring.chunked`)."""
    scale: float | None = None
    """Scale of the scores; None for D ** -0.5."""
    softcap: float | None = None
    """Logit softcap (`kernels.attention.paged.Scoring.softcap`)."""
    gated: bool = False
    """Whether each head's output is multiplied by a sigmoid gate, whose columns follow the head's queries in q_proj
    (arXiv:2505.06708)."""
    interleaved: bool = False
    """Whether rope pairs the rotated columns as (2i, 2i + 1) (GPT-J, Cohere); False for (i, i + R/2)."""
    rotated_norm: float | None = None
    """Epsilon of an RMSNorm without a scale on queries and keys after rope, in layers that have one (Llama 4); None for
    no norm."""
    query_growth: Growth | None = None
    """Growth of queries with their position, which keeps attention sharp in long sequences (Llama 4, Ministral 3); None
    for none."""
    value_norm: bool = False
    """Whether values are divided by their root mean square, with the epsilon of the other norms (Gemma 4)."""
    keys_are_values: bool = False
    """Whether values are the projected keys, before norm and rope (Gemma 4)."""
    lends: bool = False
    """Whether later layers attend to this layer's keys and values."""
    lender: int | None = None
    """Layer whose keys and values this one attends to, so that it has queries alone; None for its own."""
    sinks: bool = False
    """Whether each head has an attention sink: a learned logit in the softmax beside the keys (arXiv:2309.17453)."""

    @property
    def scoring(self) -> Scoring:
        """Scale, window and softcap for the kernels."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return Scoring(scale, self.window, self.softcap, chunked=self.chunked and self.window is not None)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245), with optional rotary embeddings, q/k norms, gating and sinks."""

    no_split = True
    """A placement shards or replicates all parts together (`loading.weights.placeable`)."""
    adaptable = True
    """Whether its projections may have LoRA adapters (`layers.adapters`)."""

    def __init__(self, build: Build, spec: AttentionSpec):
        self.spec = spec
        self.replicated = build.replicated
        self.layout = HeadLayout.of(build, spec.heads, spec.kv_heads)
        heads = self.layout.outputs(spec.head_dim)
        queries = replace(heads[0], width=2 * spec.head_dim) if spec.gated else heads[0]
        self.tp, made = build.tp, heads[1:2] if spec.keys_are_values else heads[1:]
        self.qkv = FusedLinear(
            build, spec.width, (queries, *made) if spec.lender is None else (queries,), bias=spec.qkv_bias
        )
        self.out = RowLinear(build, axes.HEADS, heads[0], spec.width, bias=spec.out_bias)
        normed, scaling = spec.norm_eps is not None, spec.norm_scaling
        each = normed and not spec.norm_whole
        self.q_norm = RMSNorm(build, spec.head_dim, spec.norm_eps, axes.HEAD_DIM, scaling) if each else None
        own = each and spec.lender is None
        self.k_norm = RMSNorm(build, spec.head_dim, spec.norm_eps, axes.HEAD_DIM, scaling) if own else None
        # Scales of q, then of k, sharded like their columns.
        whole = normed and spec.norm_whole
        self.norm_scale = by_columns(build, heads[:2], 1.0 - scaling.offset) if whole else None
        self.sinks = by_columns(build, (replace(heads[0], name="sinks", width=1),), 0.0) if spec.sinks else None

    @property
    def cache_spec(self) -> Full | Lent:
        """Cache spec of the layer."""
        if self.spec.lender is not None:
            return Lent(self.spec.lender, self.replicated)
        spec = Full(self.layout.kv_heads_on(self.tp), self.spec.head_dim, self.replicated)
        if self.spec.window is None:
            return spec
        own = self.spec
        return Sliding(spec.kv_heads, spec.head_dim, spec.replicated, window=own.window, chunked=own.chunked)

    def __call__(
        self, x: jax.Array, kv_cache: KVCache, rope: tuple[jax.Array, jax.Array] | None, step: StepContext
    ) -> tuple[jax.Array, KVCache | Lending]:
        """Apply attention.

        Args:
            x: `[T, M]`.
            kv_cache: cache arrays of the layer.
            rope: cosines and sines of the positions; None if the layer has no positional encoding.
            step: the layer's view of the step.

        Returns:
            `[T, M]` and the cache arrays with this step's keys and values, which a layer that lends returns beside.
        """
        q, k, v, gate = self._project(x, rope, step)
        sinks = None if self.sinks is None else self.sinks[...]
        y, kv_cache = attend(q, k, v, kv_cache, step, self.spec.scoring, sinks)
        if gate is not None:
            y = y * jax.nn.sigmoid(gate)
        y = self.out(y.reshape(*y.shape[:2], -1))
        return y, Lending(kv_cache, Loan(k, v)) if self.spec.lends else kv_cache

    def _project(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array] | None, step: StepContext
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Return queries, keys, values and the gate, each `[T, tp, heads / tp, D]`, as they are attended to."""
        if rope is not None and self._turns(x):
            q, k, v = self._native(x, rope)
            return self._grown(q, step), k, v, None
        q, *kv = self.qkv(x)
        if self.norm_scale is not None:
            q, kv[0] = self._normalise(q, kv[0], step.mesh)
        q, *kv = (y.reshape(*y.shape[:2], -1, self.spec.head_dim) for y in (q, *kv))
        gate = None
        if self.spec.gated:
            q, gate = q[:, :, ::2], q[:, :, 1::2]
        q = self._grown(self._turned(q if self.q_norm is None else self.q_norm(q), rope), step)
        if not kv:
            # Kernels read a step's own keys from their arguments, and write them again where the lender has.
            return q, step.lent.keys, step.lent.values, gate
        k, v = kv[0], kv[-1]
        v = normalise(v, self.spec.norm_eps).astype(v.dtype) if self.spec.value_norm else v
        return q, self._turned(k if self.k_norm is None else self.k_norm(k), rope), v, gate

    def _grown(self, q: jax.Array, step: StepContext) -> jax.Array:
        """Multiply queries by the factor of their positions, if there is one."""
        return q if self.spec.query_growth is None else self.spec.query_growth(q, step.positions)

    def _turns(self, x: jax.Array) -> bool:
        """Return whether one kernel norms and rotates queries and keys (`_native`)."""
        spec, norms = self.spec, [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        other = spec.lender is not None or spec.keys_are_values or spec.gated or spec.norm_whole or spec.value_norm
        if other or spec.rotated_norm is not None or self.qkv.tp > 1:
            return False
        beside = [norm.scale[...] for norm in norms] + ([] if self.qkv.bias is None else [self.qkv.bias[...]])
        return rowwise.serves(self.qkv.kernel, x, *beside)

    def _native(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        """Return queries, keys and values, each `[T, 1, heads, D]`, before `_grown`.

        The bits are the same where something reads or changes the projections or norms apart: a deterministic engine
        may do so, and its trainer not.
        """
        scales, how, dim = None, rowwise.RmsScaling(0.0, *Scaling()), self.spec.head_dim
        norms = [] if self.q_norm is None else [self.q_norm, self.k_norm]
        if self.qkv.is_whole and not any(norm.tapped for norm in norms):
            qkv = self.qkv.whole(x)
            if norms:
                scales, how = tuple(norm.scale[...] for norm in norms), norms[0].how
        else:
            parts = [y.reshape(*y.shape[:2], -1, dim) for y in self.qkv(x)]
            parts[: len(norms)] = [norm(y) for norm, y in zip(norms, parts, strict=False)]
            qkv = jnp.concatenate([y.reshape(y.shape[0], -1) for y in parts], axis=1)
        heads = tuple(output.columns(1) // dim for output in self.qkv.outputs[:2])
        made = rowwise.turn(qkv, *rope, scales, how, heads, dim, interleaved=self.spec.interleaved)
        return tuple(part[:, None] for part in made)

    def _turned(self, x: jax.Array, rope: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        """Rotate queries or keys, and normalise them if the norm follows."""
        if rope is None:
            return x
        if self.spec.interleaved:
            x = deinterleave(x, 2 * rope[0].shape[-1])
        x = apply_rope(x, *rope)
        return x if self.spec.rotated_norm is None else normalise(x, self.spec.rotated_norm).astype(x.dtype)

    def _normalise(self, q: jax.Array, k: jax.Array, mesh: Mesh) -> tuple[jax.Array, ...]:
        """Apply the q and k norms over the whole width of each; `[T, tp, columns]`."""
        shards, layout = q.shape[1], self.layout
        # A kv head repeated on several shards enters the sum of squares once per shard.
        copies = max(1, shards // layout.stored_kv_heads)
        widths = [layout.heads * self.spec.head_dim, copies * layout.kv_heads * self.spec.head_dim]
        local = partial(
            normalise_together,
            widths=widths,
            eps=self.spec.norm_eps,
            over=None if shards == 1 else axes.MODEL,
            scaling=self.spec.norm_scaling,
        )
        if shards == 1:  # replicated layers run without `shard_map`
            return local((q, k), self.norm_scale[...])
        divided = PartitionSpec(None, axes.MODEL)
        specs = (divided, divided), PartitionSpec(axes.MODEL)
        return on_shards(local, mesh, specs, (divided, divided), (q, k), self.norm_scale[...])

    def collectives(self) -> list[Collective]:
        """Return the all-reduce of the q/k norm if its width is sharded."""
        if self.norm_scale is None or self.norm_scale.shape[0] == 1:
            return []
        return [Collective(ALL_REDUCE, "squares of q and k", 2, itemsize=4)]
