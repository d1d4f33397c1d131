"""Qwen3-VL's vision tower: images of any size, packed one after another, with DeepStack's rows.

Axes beside those of `sharding.axes`: U values, each a block of merged patches; S = U * merged patches, in the order of
blocks; W the tower's width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.kernels.attention.paged import Scoring
from jaxinfer.kernels.matmul.choose import matmul
from jaxinfer.layers.encoder import EncodeStep, attend_both_ways
from jaxinfer.layers.heads import HeadLayout
from jaxinfer.layers.linear import FusedLinear, MatmulModule, RowLinear
from jaxinfer.layers.mlp import MLP
from jaxinfer.layers.norms import LayerNorm
from jaxinfer.layers.params import Build, constant, weight
from jaxinfer.layers.rope import apply_rope
from jaxinfer.models.qwen3_vl.config import TowerConfig
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ENCODE

EPS = 1e-6


class Patches(MatmulModule):
    """Embed patches, and add learned positions that are resampled to the image's grid."""

    no_split = True

    def __init__(self, build: Build, config: TowerConfig):
        self.config = config
        # Same shape as the convolution weight in the checkpoint.
        shape = (config.width, config.channels, config.frames, config.patch, config.patch)
        self.weight = weight(build, shape, (axes.EMBED, *[None] * 4), np.prod(shape[1:]) ** -0.5)
        self.bias = constant(build, shape[:1], (axes.EMBED,), 0.0)
        self.positions = weight(build, (config.grid**2, config.width), (None, axes.EMBED), 0.02)

    def __call__(self, pixels: jax.Array, places: jax.Array, sizes: jax.Array) -> jax.Array:
        """Map patches `[S, C, P, P]` at rows and columns `[S, 2]` of grids of `sizes` `[S, 2]` to `[S, W]`."""
        kernel = self.weight[...].reshape(self.config.width, -1)
        pixels = jnp.broadcast_to(pixels[:, :, None], (*pixels.shape[:2], self.config.frames, *pixels.shape[2:]))
        flat = pixels.reshape(pixels.shape[0], -1).astype(kernel.dtype)
        x = matmul(flat, kernel, kernel=self.kernel) + self.bias[...]
        return x + self._resampled(places, sizes).astype(x.dtype)

    def _resampled(self, places: jax.Array, sizes: jax.Array) -> jax.Array:
        """Return positions `[S, W]` in float32, bilinear between those of the learned grid; corners are aligned."""
        side, table = self.config.grid, self.positions[...]
        at = places * (side - 1) / jnp.maximum(sizes - 1, 1).astype(jnp.float32)
        low = jnp.clip(at.astype(jnp.int32), 0, side - 1)
        share, high = at - low, jnp.minimum(low + 1, side - 1)
        made = jnp.zeros((len(places), table.shape[1]), jnp.float32)
        for row, of_row in ((low[:, 0], 1 - share[:, 0]), (high[:, 0], share[:, 0])):
            for column, of_column in ((low[:, 1], 1 - share[:, 1]), (high[:, 1], share[:, 1])):
                made += (of_row * of_column)[:, None] * table[row * side + column].astype(jnp.float32)
        return made


class TowerAttention(nnx.Module):
    """Bidirectional attention within each image; queries and keys rotate by row and column."""

    no_split = True

    def __init__(self, build: Build, config: TowerConfig):
        self.head_dim = config.head_dim
        outputs = HeadLayout.of(build, config.heads, config.heads).outputs(config.head_dim)
        self.qkv = FusedLinear(build, config.width, outputs, bias=True)
        self.out = RowLinear(build, axes.HEADS, outputs[0], config.width, bias=True)

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], step: EncodeStep) -> jax.Array:
        """Map `[S, W]` to `[S, W]`; `rope` has cosines and sines `[S, D/2]`."""
        q, k, v = (y.reshape(*y.shape[:2], -1, self.head_dim) for y in self.qkv(x))
        q, k = (apply_rope(y.astype(jnp.float32), *rope).astype(y.dtype) for y in (q, k))
        y = attend_both_ways(q, k, v, step, Scoring(self.head_dim**-0.5))
        return self.out(y.reshape(*y.shape[:2], -1))


class TowerLayer(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, build: Build, config: TowerConfig):
        width = config.width
        self.attention_norm = LayerNorm(build.at("attention_norm"), width, EPS, axes.EMBED)
        self.attention = TowerAttention(build.at("attention"), config)
        self.mlp_norm = LayerNorm(build.at("mlp_norm"), width, EPS, axes.EMBED)
        self.mlp = MLP(build.at("mlp"), width, config.ffn, width, config.activation)

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], step: EncodeStep) -> jax.Array:
        """Map `[S, W]` to `[S, W]`; `rope` has cosines and sines `[S, D/2]`."""
        x = x + self.attention(self.attention_norm(x), rope, step)
        return x + self.mlp(self.mlp_norm(x))


class Merger(nnx.Module):
    """Merge blocks of patches to rows of the language model's width: LayerNorm, then an MLP.

    `whole`: whether the norm is over a block instead of over each patch.
    """

    def __init__(self, build: Build, config: TowerConfig, *, whole: bool):
        self.width = config.width * config.merged
        self.norm = LayerNorm(build.at("norm"), self.width if whole else config.width, EPS, axes.EMBED)
        self.mlp = MLP(build.at("mlp"), self.width, self.width, config.out, "gelu")
        self.whole = whole

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[S, W]` to `[U, M]`."""
        x = self.norm(x.reshape(-1, self.width)) if self.whole else self.norm(x).reshape(-1, self.width)
        return self.mlp(x)


class Tower(nnx.Module):
    """Patch embedding, layers, and mergers of the last layer's output and of those of DeepStack."""

    steps = (ENCODE,)

    def __init__(self, build: Build, config: TowerConfig):
        self.config = config
        self.patches = Patches(build.at("patches"), config)
        self.layers = nnx.List([TowerLayer(build.at("layers", i), config) for i in range(config.layers)])
        self.merger = Merger(build.at("merger"), config, whole=False)
        self.deeper = nnx.List([Merger(build.at("deeper", i), config, whole=True) for i in range(len(config.taps))])

    def __call__(self, pixels: jax.Array, numbers: jax.Array, step: EncodeStep) -> jax.Array:
        """Map values `[U, merged, C, P, P]` to rows `[U, (1 + taps) M]`.

        `numbers` `[U, 4]` are row and column of a value in its image's grid of values, and the grid's rows and columns.
        """
        places, sizes = self._places(numbers)
        x, deeper = self.patches(pixels.reshape(-1, *pixels.shape[2:]), places, sizes), []
        rope = self._rope(places)
        for number, layer in enumerate(self.layers):
            x = layer(x, rope, step)
            if number in self.config.taps:
                deeper.append(self.deeper[len(deeper)](x))
        return jnp.concatenate([self.merger(x), *deeper], axis=1)

    def _places(self, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return each patch's row and column `[S, 2]` in its image, and the image's rows and columns of patches."""
        merge = self.config.merge
        within = jnp.stack(jnp.meshgrid(jnp.arange(merge), jnp.arange(merge), indexing="ij"), axis=-1).reshape(-1, 2)
        places = (numbers[:, None, :2] * merge + within).reshape(-1, 2)
        return places, jnp.repeat(numbers[:, 2:] * merge, merge**2, axis=0)

    def _rope(self, places: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return cosines and sines `[S, D/2]`: the first half of the frequencies turns by row, the second by column."""
        half = self.config.head_dim // 2
        exponents = np.arange(0, half, 2, dtype=np.float32) / half
        frequencies = (1 / np.float64(self.config.theta) ** exponents.astype(np.float64)).astype(np.float32)
        angles = (places.astype(jnp.float32)[:, :, None] * frequencies).reshape(len(places), -1)
        return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def weight_rules(config: TowerConfig) -> list[Rule]:
    """Return the weight rules of the tower, with names and targets relative to it."""
    table = [Rule("pos_embed.weight", "patches.positions")]

    def both(source: str, target: str, parts: tuple[str, ...] = (), weight: str = "weight") -> None:
        table.append(Rule(f"{source}.weight", f"{target}.{weight}", parts))
        table.append(Rule(f"{source}.bias", f"{target}.bias", parts))

    both("patch_embed.proj", "patches")
    for i in range(config.layers):
        source, target = f"blocks.{i}", f"layers.{i}"
        both(f"{source}.norm1", f"{target}.attention_norm", weight="scale")
        both(f"{source}.attn.qkv", f"{target}.attention.qkv", ("q", "k", "v"))
        both(f"{source}.attn.proj", f"{target}.attention.out")
        both(f"{source}.norm2", f"{target}.mlp_norm", weight="scale")
        both(f"{source}.mlp.linear_fc1", f"{target}.mlp.up", ("up",))
        both(f"{source}.mlp.linear_fc2", f"{target}.mlp.down")
    mergers = [("merger", "merger"), *((f"deepstack_merger_list.{i}", f"deeper.{i}") for i in range(len(config.taps)))]
    for source, target in mergers:
        both(f"{source}.norm", f"{target}.norm", weight="scale")
        both(f"{source}.linear_fc1", f"{target}.mlp.up", ("up",))
        both(f"{source}.linear_fc2", f"{target}.mlp.down")
    return table
