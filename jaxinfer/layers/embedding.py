"""Token embedding and language-model head, both sharded over the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer.kernels.matmul import int8_matmul
from jaxinfer.layers.linear import MatmulModule
from jaxinfer.layers.norms import scale_by
from jaxinfer.layers.params import Build, constant, matrix, weight
from jaxinfer.sharding import axes
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding.collectives import ALL_REDUCE, Collective


class Embedding(MatmulModule):
    """Table `[V', M]` of token embeddings, a language-model head, or both; V' is V padded to a multiple of the shards.

    Args:
        build: dtype, mesh and path of the parameters.
        vocab: V.
        width: M.
        lookup: whether the table embeds tokens.
        head: whether the table computes logits; with `lookup`, embedding and head are tied.
        scale: multiplier of embeddings; None for no scaling.
        round_scale: whether `scale` is first rounded to the embeddings' dtype, as for Gemma in transformers.
        softcap: maps logits x to cap * tanh(x / cap); None for no softcap.
        logit_scale: multiplier of logits, before the softcap; None for no scaling.
        bias: whether logits have a bias.
    """

    no_split = True

    def __init__(
        self,
        build: Build,
        vocab: int,
        width: int,
        *,
        lookup: bool = True,
        head: bool = False,
        scale: float | None = None,
        round_scale: bool = True,
        softcap: float | None = None,
        logit_scale: float | None = None,
        bias: bool = False,
    ):
        self.vocab, self.tp, self.lookup, self.head = vocab, build.tp, lookup, head
        rounded = scale is not None and round_scale
        self.scale = float(np.asarray(scale, np.dtype(build.dtype))) if rounded else scale
        self.softcap, self.logit_scale = softcap, logit_scale
        shards = meshes.size(build.mesh)  # replicated tables are padded too, so that V' does not depend on placement
        padded = -(-vocab // shards) * shards
        self.dtype = build.dtype
        shape, names = (padded, width), (axes.VOCAB, axes.EMBED)
        self.block = int8_matmul.rotation(width)
        self.weight, self.weight_scale = matrix(
            build, shape, names, 0.02, block=self.block, whole_scales=True, unpadded=(vocab, width)
        )
        self.bias = constant(build, (padded,), (axes.VOCAB,), 0.0, unpadded=(vocab,)) if bias else None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Embed token ids `[T]` as `[T, M]`; ids of padding are clamped, their embeddings are not used."""
        rows = jnp.take(self.weight[...], tokens, axis=0, mode="clip")
        if self.weight_scale is not None:
            scales = jnp.take(self.weight_scale[...], tokens, mode="clip")
            # Another rotation undoes that of the weight.
            rows = int8_matmul.rotate(rows.astype(jnp.float32) * scales[:, None], self.block).astype(self.dtype)
        return rows if self.scale is None else scale_by(rows, self.scale)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute float32 logits `[B, V']` of hidden states `[B, M]`; logits of vocabulary padding are -inf."""
        logits = self.product(hidden, self.weights, jnp.dtype("float32"))
        if self.bias is not None:
            logits = logits + self.bias[...].astype(jnp.float32)
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        if logits.shape[-1] == self.vocab:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1]) < self.vocab, logits, -jnp.inf)

    def collectives(self) -> list[Collective]:
        """Return the all-reduce of the lookup: each shard returns zeros for rows it does not have.

        Collectives of operations on sharded logits are declared by those operations.
        """
        return [Collective(ALL_REDUCE, "rows looked up", self.weight.shape[1])] if self.lookup and self.tp > 1 else []

    @property
    def logit_shards(self) -> int:
        """Shards over which logits are divided; 0 if the table is not a head."""
        return self.tp if self.head else 0


class LearnedPositions(nnx.Module):
    """Learned position embeddings; the table has `offset` rows before that of position 0."""

    no_split = True

    def __init__(self, build: Build, count: int, width: int, *, offset: int = 0):
        self.offset = offset
        self.weight = weight(build, (count + offset, width), (None, axes.EMBED), 0.02)

    def __call__(self, positions: jax.Array) -> jax.Array:
        """Embed positions `[T]` as `[T, M]`."""
        return jnp.take(self.weight[...], positions + self.offset, axis=0, mode="clip")
