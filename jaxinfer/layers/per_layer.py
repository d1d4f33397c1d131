"""Per-layer input embeddings (Gemma 3n and 4): a narrow embedding of each token for each layer."""

import jax
from flax import nnx

from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.linear import WholeLinear
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.norms import RMSNorm, Scaling, scale_by
from jaxinfer.layers.params import Build
from jaxinfer.sharding import axes


class PerLayerInputs(nnx.Module):
    """Embeddings of each token for every layer: looked up, and projected from the token's own embedding.

    Args:
        build: how parameters are made.
        vocab: rows of the table.
        sizes: L layers of P columns.
        width: M.
        eps, scaling: of the norm of projected inputs.
    """

    def __init__(self, build: Build, vocab: int, sizes: tuple[int, int], width: int, eps: float, scaling: Scaling):
        self.sizes, columns = sizes, sizes[0] * sizes[1]
        # A table used for lookups only gains nothing from int8.
        lookup = build._replace(quantization=None)
        self.embedding = Embedding(lookup.at("embedding"), vocab, columns, scale=sizes[1] ** 0.5)
        self.projection = WholeLinear(build.at("projection"), width, columns)
        self.norm = RMSNorm(build.at("norm"), sizes[1], eps, None, scaling)

    def __call__(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """Return `[T, L, P]` for token ids `[T]` and embeddings `[T, M]`."""
        projected = scale_by(self.projection(x), x.shape[-1] ** -0.5).reshape(-1, *self.sizes)
        found = self.embedding(tokens).reshape(-1, *self.sizes)
        return scale_by(self.norm(projected) + found, 2**-0.5)


class PerLayerInput(nnx.Module):
    """`norm(out(act(gate(x)) * inputs))`: what a layer makes of its inputs `[T, P]` and hidden states `[T, M]`."""

    no_split = True

    def __init__(self, build: Build, width: int, columns: int, activation: str, eps: float, scaling: Scaling):
        self.gate = WholeLinear(build.at("gate"), width, columns)
        self.out = WholeLinear(build.at("out"), columns, width)
        self.norm = RMSNorm(build.at("norm"), width, eps, axes.EMBED, scaling)
        self.activation = activation

    def __call__(self, x: jax.Array, inputs: jax.Array) -> jax.Array:
        """Return `[T, M]`, to be added to `x`."""
        return self.norm(self.out(ACTIVATIONS[self.activation](self.gate(x)) * inputs))
