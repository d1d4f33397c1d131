"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434) as in DeepSeek-V3 and, without rope, Kimi-Linear.

The down-projections of a token, to its kv latent and to its query (or the query's latent), are one GEMM. Latents and
their cache are replicated on every shard; heads are sharded.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention import joint, latent
from jaxinfer.kernels.attention.joint import JointRows
from jaxinfer.kernels.attention.latent import Expansion
from jaxinfer.kernels.attention.paged import DecodeRows, KVCache, PrefillTiles, Scoring, Slots
from jaxinfer.kv.spec import Latent
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.linear import BatchedLinear, FusedLinear, Output, RowLinear
from jaxinfer.layers.norms import RMSNorm
from jaxinfer.layers.params import Build, weight
from jaxinfer.layers.rope import apply_rope, deinterleave
from jaxinfer.layers.sharded import model_axis, on_shards
from jaxinfer.sharding import axes

EXPANDING = attention.XLA_PREFILL | {attention.NATIVE}
"""Attention implementations with which prefill expands latents to keys and values, in XLA.

On a CPU that is faster than the native kernel on absorbed queries: 16 heads of 128, bfloat16, 512 prompt tokens take 17
against 57 ms, after 1536 cached ones 87 against 304 ms (jax 0.12, two cores with other work on them). Triton's kernel
runs absorbed: expanding needs a third of the multiplications, but loops driven by the host. Not measured on a GPU yet.
Deterministic steps, in which a decoding sequence is a chunk of one token, run absorbed too: expanding all latents for
each new token would cost more than it saves.
"""


@dataclass(frozen=True)
class LatentSpec:
    """Configuration of an MLA layer."""

    width: int
    """M."""
    heads: int
    """H."""
    rank: int
    """L: columns of the latent from which keys and values are computed (kv_lora_rank)."""
    key_dim: int
    """Dn: columns of a head's key computed from the latent (qk_nope_head_dim)."""
    shared_dim: int
    """R: key columns shared by all heads, rotated in models with rope (qk_rope_head_dim)."""
    value_dim: int
    """Dv."""
    scale: float
    """Scale of the scores."""
    query_rank: int | None = None
    """Columns of the query latent (q_lora_rank); None if queries are computed from the input."""
    norm_eps: float = 1e-6
    """Epsilon of both latents' norms."""
    interleaved: bool = False
    """Whether rope rotates columns (2i, 2i + 1) of the checkpoint (DeepSeek); False for two halves."""
    bias: bool = False
    """Whether the down-projections and the output projection have biases."""

    @property
    def latent_width(self) -> int:
        """Columns of the cache."""
        return self.rank + self.shared_dim


class LatentAttention(nnx.Module):
    """MLA layer: absorbed in decode, expanded in prefill (`kernels.attention.latent`, `EXPANDING`).

    Its cache is one array `[N, 1, P, spec.latent_width]`, replicated on every device, with no separate values.
    """

    no_split = True
    """A placement shards or replicates all parts together (`loading.weights.placeable`)."""

    def __init__(self, build: Build, spec: LatentSpec):
        """Create the layer.

        Raises:
            ConfigError: the heads do not divide over the shards; this layer does not pad heads.
        """
        self.spec, self.replicated = spec, build.replicated
        queries = Output("q", spec.heads, spec.key_dim + spec.shared_dim)
        kept = Output("kv_a", 1, spec.latent_width, sharded=False)
        first = queries if spec.query_rank is None else Output("q_a", 1, spec.query_rank, sharded=False)
        self.down = FusedLinear(build, spec.width, (first, kept), bias=("q_a", "kv_a") if spec.bias else False)
        rank = spec.query_rank
        self.q_norm = None if rank is None else RMSNorm(build, rank, spec.norm_eps, None)
        self.q_up = None if rank is None else BatchedLinear(build, rank, (queries,))
        self.norm = RMSNorm(build, spec.rank, spec.norm_eps, None)
        # Multiplied from both sides (absorb, release), so per-row int8 scales would not do: kept in the model's dtype.
        up = Output("kv_b", spec.heads, spec.key_dim + spec.value_dim)
        shape, names = (build.tp, up.columns(build.tp, build.path), spec.rank), (axes.SHARD, axes.COLUMNS, axes.EMBED)
        self.up = weight(build, shape, names, spec.rank**-0.5, outputs=(up,))
        self.out = RowLinear(build, axes.HEADS, Output("v", spec.heads, spec.value_dim), spec.width, bias=spec.bias)

    @property
    def cache_spec(self) -> Latent:
        """Cache spec of the layer."""
        return Latent(head_dim=self.spec.latent_width)

    def __call__(
        self, x: jax.Array, kv_cache: KVCache, rope: tuple[jax.Array, jax.Array] | None, step: StepContext
    ) -> tuple[jax.Array, KVCache]:
        """Apply attention.

        Args:
            x: `[T, M]`.
            kv_cache: cache array of the layer.
            rope: cosines and sines of the positions; None if the model has no rotary embedding.
            step: the layer's view of the step.

        Returns:
            `[T, M]` and the cache array with this step's latents.
        """
        spec = self.spec
        q, kept = self.down(x)
        if self.q_up is not None:
            (q,) = self.q_up(self.q_norm(q))
        q = q.reshape(*q.shape[:2], -1, spec.key_dim + spec.shared_dim)
        own, shared = self.norm(kept[..., : spec.rank]), kept[..., spec.rank :]
        if rope is not None:
            turned = self._rotate(q[..., spec.key_dim :], rope)
            q, shared = jnp.concatenate([q[..., : spec.key_dim], turned], axis=-1), self._rotate(shared, rope)
        y, kv_cache = self._attend(q, jnp.concatenate([own, shared], axis=-1), kv_cache, step)
        return self.out(y), kv_cache

    def _rotate(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Rotate the shared columns `[T, ..., R]` of queries or keys."""
        return apply_rope(deinterleave(x) if self.spec.interleaved else x, *rope)

    def _attend(
        self, q: jax.Array, latents: jax.Array, kv_cache: KVCache, step: StepContext
    ) -> tuple[jax.Array, KVCache]:
        """Attend: q `[T, tp, H / tp, Dn + R]`, latents `[T, tp, L + R]` -> `[T, tp, H / tp * Dv]` and the cache."""
        spec = self.spec
        kernel = attention.implementation(step.kernel, step.mesh, deterministic=step.deterministic)
        scoring = Scoring(spec.scale, value_dim=spec.rank)

        def local(
            q: jax.Array, latents: jax.Array, up: jax.Array, kv_cache: KVCache, step: StepContext
        ) -> tuple[jax.Array, KVCache]:
            q, latents = q[:, 0], latents[:, 0]
            heads = up.reshape(-1, spec.key_dim + spec.value_dim, spec.rank)
            expansion = Expansion(heads[:, : spec.key_dim], heads[:, spec.key_dim :])

            def absorbed(
                q: jax.Array, latents: jax.Array, kv_cache: KVCache, slots: Slots, rows: DecodeRows | PrefillTiles
            ) -> tuple[jax.Array, KVCache]:
                decoding, own = isinstance(rows, DecodeRows), (latent.absorb(q, expansion), latents[:, None], None)
                run = partial(kernel.decode, items=step.items) if decoding else partial(kernel.prefill, tile=step.tile)
                out, kv_cache = run(*own, kv_cache, slots, rows, scoring, None)
                return latent.release(out, expansion), kv_cache

            expands = step.kernel in EXPANDING and not step.deterministic
            expanded = partial(latent.prefill, expansion=expansion, scale=spec.scale)
            prefill = expanded if expands else absorbed
            if isinstance(step.rows, JointRows):
                out, kv_cache = joint.attend(prefill, absorbed, (q, latents), kv_cache, step.slots, step.rows)
            else:
                run = absorbed if isinstance(step.rows, DecodeRows) else prefill
                out, kv_cache = run(q, latents, kv_cache, step.slots, step.rows)
            return out.reshape(out.shape[0], 1, -1), kv_cache

        model = model_axis(q.shape[1])
        tokens, whole = PartitionSpec(None, model), PartitionSpec()
        specs = tokens, tokens, PartitionSpec(model), whole, whole
        return on_shards(local, step.mesh, specs, (tokens, whole), q, latents, self.up[...], kv_cache, step)
