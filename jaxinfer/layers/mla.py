"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) as in DeepSeek-V3 and, without rotary positions,
Kimi-Linear.

The latent of a token and its query, or that query's own latent, are one GEMM. Latents are whole on every shard, as is
the cache of them; heads are divided.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention import latent
from jaxinfer.kernels.attention.latent import Expansion
from jaxinfer.kernels.attention.paged import DecodeRows, Lane, Scoring
from jaxinfer.kv.spec import Latent
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.linear import BatchedLinear, FusedLinear, Output, RowLinear
from jaxinfer.layers.norms import RMSNorm
from jaxinfer.layers.params import Build, weight
from jaxinfer.layers.rope import apply_rope, deinterleave
from jaxinfer.layers.sharded import model_axis, on_shards
from jaxinfer.sharding import axes

EXPANDING = frozenset({attention.XLA, attention.NATIVE})
"""Implementations of attention beside which a prefill is expanded, in XLA. On a CPU that is faster than the native
kernel
absorbed: 16 heads of 128, bfloat16, 512 tokens of a prompt 17 against 57 ms, behind 1536 others 87 against 304 (jax
0.12, two cores with other work on them). Triton's kernel does it absorbed: its third of the multiplications would cost
loops that the host drives. Not measured on a GPU yet."""


@dataclass(frozen=True)
class LatentSpec:
    """The shape of one layer."""

    width: int
    """M."""
    heads: int
    """H."""
    rank: int
    """L: columns of the latent that keys and values are made of."""
    key_dim: int
    """Dn: columns of a head's key that are made of the latent."""
    shared_dim: int
    """R: columns of a key that all heads share; they are rotated where the model has rotary positions."""
    value_dim: int
    """Dv."""
    scale: float
    """Multiplies the scores."""
    query_rank: int | None = None
    """Columns of the latent that queries are made of; None: they are made of the input."""
    norm_eps: float = 1e-6
    """Of the norms of both latents."""
    interleaved: bool = False
    """Whether rotary pairs lie side by side in the checkpoint's columns (DeepSeek), not in two halves."""
    bias: bool = False
    """Whether the projections to the latents, and the one behind attention, have one."""

    @property
    def kept(self) -> int:
        """Columns of the cache."""
        return self.rank + self.shared_dim


class LatentAttention(nnx.Module):
    """One layer: absorbed in decode, expanded in prefill (`kernels.latent`, `EXPANDING`).

    Of the cache it asks for one array `[N, 1, P, spec.kept]`, whole on every device, with no values of its own.
    """

    placed_whole = True
    """Its parts are divided alike (`loading.weights.placeable`)."""

    def __init__(self, build: Build, spec: LatentSpec):
        """The layer.

        Raises:
            ConfigError: heads that do not divide over the shards; none are added.
        """
        self.spec, self.replicated = spec, build.replicated
        queries = Output("q", spec.heads, spec.key_dim + spec.shared_dim)
        kept = Output("kv_a", 1, spec.kept, sharded=False)
        first = queries if spec.query_rank is None else Output("q_a", 1, spec.query_rank, sharded=False)
        self.down = FusedLinear(build, spec.width, (first, kept), bias=("q_a", "kv_a") if spec.bias else False)
        rank = spec.query_rank
        self.q_norm = None if rank is None else RMSNorm(build, rank, spec.norm_eps, None)
        self.q_up = None if rank is None else BatchedLinear(build, rank, (queries,))
        self.norm = RMSNorm(build, spec.rank, spec.norm_eps, None)
        # Multiplied from both sides, so that scales of its rows would not do: it stays in the model's dtype.
        up = Output("kv_b", spec.heads, spec.key_dim + spec.value_dim)
        shape, names = (build.tp, up.columns(build.tp, build.path), spec.rank), (axes.SHARD, axes.COLUMNS, axes.EMBED)
        self.up = weight(build, shape, names, spec.rank**-0.5, outputs=(up,))
        self.out = RowLinear(build, axes.HEADS, Output("v", spec.heads, spec.value_dim), spec.width, bias=spec.bias)

    @property
    def cache_spec(self) -> Latent:
        """What the layer keeps."""
        return Latent(head_dim=self.spec.kept)

    def __call__(
        self, x: jax.Array, lane: Lane, rope: tuple[jax.Array, jax.Array] | None, step: StepContext
    ) -> tuple[jax.Array, Lane]:
        """`[T, M]` -> `[T, M]` and the lane with this step's latents in it; `rope` None: the model has no such
        positions."""
        spec = self.spec
        q, kept = self.down(x)
        if self.q_up is not None:
            (q,) = self.q_up(self.q_norm(q))
        q = q.reshape(*q.shape[:2], -1, spec.key_dim + spec.shared_dim)
        own, shared = self.norm(kept[..., : spec.rank]), kept[..., spec.rank :]
        if rope is not None:
            turned = self._rotate(q[..., spec.key_dim :], rope)
            q, shared = jnp.concatenate([q[..., : spec.key_dim], turned], axis=-1), self._rotate(shared, rope)
        y, lane = self._attend(q, jnp.concatenate([own, shared], axis=-1), lane, step)
        return self.out(y), lane

    def _rotate(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Rotate the shared columns `[T, ..., R]` of queries or keys."""
        return apply_rope(deinterleave(x) if self.spec.interleaved else x, *rope)

    def _attend(self, q: jax.Array, latents: jax.Array, lane: Lane, step: StepContext) -> tuple[jax.Array, Lane]:
        """`[T, tp, H / tp, Dn + R]` and `[T, tp, L + R]` -> `[T, tp, H / tp * Dv]` and the lane, on local shapes."""
        spec, kernel = self.spec, attention.implementation(step.kernel, step.mesh)
        scoring = Scoring(spec.scale, value_dim=spec.rank)

        def local(
            q: jax.Array, latents: jax.Array, up: jax.Array, lane: Lane, step: StepContext
        ) -> tuple[jax.Array, Lane]:
            q, latents = q[:, 0], latents[:, 0]
            heads = up.reshape(-1, spec.key_dim + spec.value_dim, spec.rank)
            expansion = Expansion(heads[:, : spec.key_dim], heads[:, spec.key_dim :])
            decoding = isinstance(step.rows, DecodeRows)
            if not decoding and step.kernel in EXPANDING:
                out, lane = latent.prefill(q, latents, lane, step.slots, step.rows, expansion, spec.scale)
                return out.reshape(out.shape[0], 1, -1), lane
            attend = partial(kernel.decode, items=step.items) if decoding else partial(kernel.prefill, tile=step.tile)
            own = latent.absorb(q, expansion), latents[:, None], None
            out, lane = attend(*own, lane, step.slots, step.rows, scoring, None)
            return latent.release(out, expansion).reshape(out.shape[0], 1, -1), lane

        model = model_axis(q.shape[1])
        tokens, whole = PartitionSpec(None, model), PartitionSpec()
        specs = tokens, tokens, PartitionSpec(model), whole, whole
        return on_shards(local, step.mesh, specs, (tokens, whole), q, latents, self.up[...], lane, step)
