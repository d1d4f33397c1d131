"""What encoders of models with cross-attention are built from: the context of their step, attention in both directions.

A step encodes several inputs side by side, their positions laid flat, `[S, M]`: products see no padding between them,
and attention runs over tiles of at most `tile` queries that see the positions of their own input. Letters beside those
of `sharding.axes`: here S are the positions of a step.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention.paged import Lane, PrefillTiles, Scoring, Slots
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
    """Where the positions of one encoder step stand; a cross layer takes what `of` gives for it."""

    positions: jax.Array
    """`[S]` int32: each one's position in its input; 0 for padding."""
    rows: PrefillTiles
    """Which of them see which: `tables` `[1, S]`, each position a block of its own."""
    slots: tuple[Slots, ...]
    """Where the keys and values of each go, one a group of cross layers; one alone where a layer has it."""
    mesh: Mesh = field(metadata={"static": True})
    kernel: str = field(default="xla", metadata={"static": True})
    """Which implementation attends (`kernels.attention.choose`)."""
    tile: int = field(default=1, metadata={"static": True})
    """Queries a tile holds at most."""
    places: tuple[Place, ...] = field(default=(), metadata={"static": True})
    """Group, counted from the first of cross layers, and lane of every layer."""

    def lane(self, layer: int) -> int:
        """Which of the lanes is the layer's, maybe with layers of other groups."""
        return self.places[layer].lane

    def of(self, layer: int) -> "EncodeStep":
        """As a cross layer sees it."""
        return replace(self, slots=(self.slots[self.places[layer].group],), places=())


def attend_both_ways(q: jax.Array, k: jax.Array, v: jax.Array, step: EncodeStep, scoring: Scoring) -> jax.Array:
    """Every position attends to all of its own input: `[S, tp, H / tp, D]`, k and v likewise -> `[S, tp, H / tp, D]`.

    By the kernels of the paged cache, over keys and values in blocks of one position: nothing is copied, no matrix of
    scores is made, and work follows the lengths of inputs. Padding gives finite values.
    """
    kernel = attention.implementation(step.kernel, step.mesh)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, step: EncodeStep) -> jax.Array:
        lane = Lane(*(x[:, 0, :, None] for x in (k, v)))
        out, _ = kernel.prefill(q[:, 0], None, None, lane, None, step.rows, scoring, tile=step.tile)
        return out[:, None]

    heads = PartitionSpec(None, model_axis(q.shape[1]))
    return on_shards(local, step.mesh, (heads, heads, heads, PartitionSpec()), heads, q, k, v, step)


class EncoderAttention(nnx.Module):
    """Attention of an encoder, in both directions and without rotary positions.

    `biases`: those of "q", "k" and "v" that have one.
    """

    placed_whole = True

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
        """`[S, M]` -> `[S, M]`."""
        q, k, v = (y.reshape(*y.shape[:2], -1, self.head_dim) for y in self.qkv(x))
        y = attend_both_ways(q, k, v, step, Scoring(self.head_dim**-0.5))
        return self.out(jnp.reshape(y, (*y.shape[:2], -1)))
