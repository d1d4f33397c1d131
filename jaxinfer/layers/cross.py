"""Cross-attention: decoder tokens attend to the output of an encoder.

Queries are projected from the decoder's hidden states, keys and values from the encoder's, each with one GEMM that
computes only what is needed (vLLM PR #12325; before it, q, k and v were computed for both). Keys and values are
computed once per encoder input, in the encoder step, and stay in cache blocks (`kv.spec.Cross`); after that a token
costs its query and the attention.
"""

from dataclasses import dataclass

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from jaxinfer.kernels.attention import paged
from jaxinfer.kernels.attention.paged import KVCache, Scoring
from jaxinfer.kv.spec import Cross
from jaxinfer.layers.attention import StepContext, attend
from jaxinfer.layers.encoder import EncodeStep
from jaxinfer.layers.heads import HeadLayout
from jaxinfer.layers.linear import FusedLinear, Output, RowLinear
from jaxinfer.layers.norms import RMSNorm
from jaxinfer.layers.params import Build
from jaxinfer.layers.sharded import model_axis, on_shards
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ENCODE


@dataclass(frozen=True)
class CrossSpec:
    """Configuration of a cross-attention layer."""

    width: int
    """M of the decoder."""
    heads: int
    """H."""
    kv_heads: int
    """K; divides H."""
    head_dim: int
    """D."""
    encoder_width: int | None = None
    """M of the encoder; None if equal to the decoder's."""
    biases: tuple[str, ...] = ()
    """Names of those of "q", "k" and "v" that have a bias."""
    out_bias: bool = False
    norm_eps: float | None = None
    """Epsilon of a per-head RMSNorm on queries and keys; None for no norm."""


class CrossQKV(nnx.Module):
    """Two fused projections: q of the decoder's hidden states, k and v of the encoder's.

    A checkpoint's q_proj fills `q`, k_proj and v_proj the parts of `kv`, as they would in a fused QKV projection.

    Args:
        build: how parameters are made.
        spec: the layer.
        heads: outputs q, k and v (`HeadLayout.outputs`).
    """

    def __init__(self, build: Build, spec: CrossSpec, heads: tuple[Output, Output, Output]):
        q, *kv = heads
        self.q = FusedLinear(build, spec.width, (q,), bias=spec.biases)
        self.kv = FusedLinear(build, spec.encoder_width or spec.width, kv, bias=spec.biases)
        self.kv.steps = (ENCODE,)


class CrossAttention(nnx.Module):
    """Grouped-query attention to encoder positions, without positional encoding."""

    no_split = True
    """A placement shards or replicates all parts together (`loading.weights.placeable`)."""

    def __init__(self, build: Build, spec: CrossSpec):
        self.spec, self.replicated = spec, build.replicated
        self.layout = HeadLayout.of(build, spec.heads, spec.kv_heads)
        heads = self.layout.outputs(spec.head_dim)
        self.qkv = CrossQKV(build, spec, heads)
        self.out = RowLinear(build, axes.HEADS, heads[0], spec.width, bias=spec.out_bias)
        normed = spec.norm_eps is not None
        self.q_norm = RMSNorm(build, spec.head_dim, spec.norm_eps, axes.HEAD_DIM) if normed else None
        self.k_norm = RMSNorm(build, spec.head_dim, spec.norm_eps, axes.HEAD_DIM) if normed else None

    @property
    def cache_spec(self) -> Cross:
        """Cache spec of the layer."""
        return Cross(self.layout.stored_kv_heads, self.spec.head_dim, self.replicated)

    def __call__(self, x: jax.Array, kv_cache: KVCache, step: StepContext) -> tuple[jax.Array, KVCache]:
        """Map `[T, M]` to `[T, M]`, leaving the cache unchanged; tokens that see no position get the output bias."""
        (q,) = self.qkv.q(x)
        q = q.reshape(*q.shape[:2], -1, self.spec.head_dim)
        if self.q_norm is not None:
            q = self.q_norm(q)
        y, kv_cache = attend(q, None, None, kv_cache, step, Scoring(self.spec.head_dim**-0.5))
        return self.out(y.reshape(*y.shape[:2], -1)), kv_cache

    def keep(self, encoded: jax.Array, kv_cache: KVCache, step: EncodeStep) -> KVCache:
        """Write keys and values of encoder outputs to the cache, in the encoder step.

        Args:
            encoded: encoder outputs, `[S, M]`.
            kv_cache: cache arrays of the layer.
            step: slots of the positions.

        Returns:
            The updated cache arrays.
        """
        k, v = (y.reshape(*y.shape[:2], -1, self.spec.head_dim) for y in self.qkv.kv(encoded))
        if self.k_norm is not None:
            k = self.k_norm(k)

        def local(k: jax.Array, v: jax.Array, kv_cache: KVCache, step: EncodeStep) -> KVCache:
            return paged.write(kv_cache, k[:, 0], v[:, 0], step.slots[0])

        heads = PartitionSpec(None, model_axis(k.shape[1]))
        return on_shards(local, step.mesh, (heads, heads, heads, PartitionSpec()), heads, k, v, kv_cache, step)
