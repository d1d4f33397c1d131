"""The token embedding and the language-model head, both divided over the vocabulary."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.linear import matmul
from jaxinfer.layers.params import Build, weight
from jaxinfer.sharding import axes


class Embedding(nnx.Module):
    """`[V', M]`, V padded up to V' so that every shard has as many rows."""

    def __init__(self, build: Build, vocab: int, width: int):
        self.vocab = vocab
        padded = -(-vocab // build.tp) * build.tp
        self.weight = weight(build, (padded, width), (axes.VOCAB, axes.EMBED), 0.02, unpadded=(vocab, width))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids `[T]` -> `[T, M]`; ids of padding rows are clamped, what they give is never used."""
        return jnp.take(self.weight[...], tokens, axis=0, mode="clip")

    def attend(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `[B, M]` -> float32 logits `[B, V']`, the rows of padding at -inf."""
        logits = matmul(hidden, self.weight[...], jnp.dtype("float32"))
        if logits.shape[-1] == self.vocab:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1]) < self.vocab, logits, -jnp.inf)
