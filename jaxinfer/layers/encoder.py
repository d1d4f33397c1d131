"""Building blocks of the encoders of cross-attention models: the encoder step's context and bidirectional attention.

A step encodes several inputs packed into one axis, `[S, M]`: GEMMs see no padding between inputs, and attention runs on
tiles of at most `tile` queries that see the positions of their own input. S here are the positions of a step.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention.paged import PrefillTiles, Scoring, Slots
from jaxinfer.kernels.attention.whole import attend_spans
from jaxinfer.kv.groups import Place
from jaxinfer.layers.heads import HeadLayout
from jaxinfer.layers.linear import FusedLinear, RowLinear
from jaxinfer.layers.params import Build
from jaxinfer.layers.sharded import model_axis, on_shards
from jaxinfer.sharding import axes


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "rows", "slots"],
    meta_fields=["mesh", "kernel", "tile", "places"],
)
@dataclass(frozen=True)
class EncodeStep:
    """Positions and slots of one encoder step; each cross layer uses its own view, `step.of(layer)`."""

    positions: jax.Array
    """Position in its input, `[S]` int32; 0 for padding."""
    rows: PrefillTiles
    """Attention tiles; `tables` is `[1, S]`, with one block per position."""
    slots: tuple[Slots, ...]
    """Slots of each position's keys and values, one entry per group of cross layers; a single one in a layer's view."""
    mesh: Mesh = field(metadata={"static": True})
    kernel: str = field(default="xla", metadata={"static": True})
    """Implementation of attention (`kernels.attention.choose`)."""
    tile: int = field(default=1, metadata={"static": True})
    """Maximum queries per tile."""
    places: tuple[Place, ...] = field(default=(), metadata={"static": True})
    """Group, numbered from the first group of cross layers, and cache array of every layer."""

    def array_index(self, layer: int) -> int:
        """Return the index of the layer's cache array, which layers of other groups may share."""
        return self.places[layer].array

    def of(self, layer: int) -> "EncodeStep":
        """Return the view of one cross layer."""
        return replace(self, slots=(self.slots[self.places[layer].group],), places=())


def attend_both_ways(q: jax.Array, k: jax.Array, v: jax.Array, step: EncodeStep, scoring: Scoring) -> jax.Array:
    """Attend bidirectionally within each input: q, k and v `[S, tp, H / tp, D]` -> `[S, tp, H / tp, D]`.

    Outputs at padding are finite.
    """
    kernel = attention.implementation(step.kernel, step.mesh)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, step: EncodeStep) -> jax.Array:
        out = attend_spans(kernel, q[:, 0], k[:, 0], v[:, 0], step.rows, scoring, tile=step.tile)
        return out[:, None]

    heads = PartitionSpec(None, model_axis(q.shape[1]))
    return on_shards(local, step.mesh, (heads, heads, heads, PartitionSpec()), heads, q, k, v, step)


class EncoderAttention(nnx.Module):
    """Bidirectional encoder attention without rotary embeddings.

    Args:
        build: how parameters are made.
        width: M.
        heads: H.
        head_dim: D.
        biases: names of those of "q", "k" and "v" that have a bias.
        out_bias: whether the output projection has a bias.
    """

    no_split = True

    def __init__(
        self,
        build: Build,
        width: int,
        heads: int,
        head_dim: int,
        *,
        biases: tuple[str, ...] = ("q", "k", "v"),
        out_bias: bool = True,
    ):
        self.head_dim = head_dim
        outputs = HeadLayout.of(build, heads, heads).outputs(head_dim)
        self.qkv = FusedLinear(build, width, outputs, bias=biases)
        self.out = RowLinear(build, axes.HEADS, outputs[0], width, bias=out_bias)

    def __call__(self, x: jax.Array, step: EncodeStep) -> jax.Array:
        """Map `[S, M]` to `[S, M]`."""
        q, k, v = (y.reshape(*y.shape[:2], -1, self.head_dim) for y in self.qkv(x))
        y = attend_both_ways(q, k, v, step, Scoring(self.head_dim**-0.5))
        return self.out(jnp.reshape(y, (*y.shape[:2], -1)))
