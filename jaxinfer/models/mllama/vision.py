"""The vision tower of Llama 3.2 Vision (arXiv:2407.21783, section 7): an image as tiles of one canvas.

A transformer reads each image as one sequence of the patches of all its tiles; a second one, gated, goes on from there.
What some of the first one's layers gave stands beside the end in every row. Letters beside those of `sharding.axes`: n
images, t tiles an image has at most, C channels, p patches of a tile, its class token among them.

Tiles that an image does not have, and zeroes that fill a tile's patches up to a multiple of 8, take part in attention,
as in the original: patches see them, but they do not see each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer.checkpoint.rules import Rule
from jaxinfer.kernels.matmul.choose import matmul
from jaxinfer.layers.linear import Multiplying
from jaxinfer.layers.mlp import MLP
from jaxinfer.layers.norms import LayerNorm
from jaxinfer.layers.params import Build, constant, weight
from jaxinfer.layers.vision import VisionAttention, VisionConfig, patches
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ENCODE

MULTIPLE = 8
"""Patches of a tile, zeroes among them, are a multiple of it."""
NORM_EPS = 1e-5
"""Of the norms before and after the first transformer, whatever that of its layers is."""


@dataclass(frozen=True)
class MllamaVisionConfig:
    """The tower, every number that shapes it."""

    layer: VisionConfig
    """Of a layer of either transformer, and of the patches; `layers` are those of the first."""
    global_layers: int
    """Of the second transformer."""
    ratios: tuple[tuple[int, int], ...]
    """Canvases, in tiles `(down, across)`; an image's number among them counts from 1."""
    tiles: int
    """t."""
    taps: tuple[int, ...]
    """Layers of the first transformer whose outputs are kept; -1: what the first one reads."""

    @property
    def patches(self) -> int:
        """p."""
        return self.layer.grid**2 + 1

    @property
    def width(self) -> int:
        """Of the rows that the tower makes."""
        return self.layer.width * (1 + len(self.taps))

    def tiles_of(self, number: int) -> int:
        """Tiles of the canvas of this number."""
        down, across = self.ratios[number - 1]
        return down * across


class Gated(nnx.Module):
    """A table with an entry an aspect ratio, times the tanh of a gate."""

    def __init__(self, build: Build, config: MllamaVisionConfig, rows: int):
        self.shape = (config.tiles, rows, config.layer.width)
        size = config.tiles * rows * config.layer.width
        self.table = weight(build, (len(config.ratios) + 1, size), (None, axes.EMBED), 0.02)
        self.gate = constant(build, (1,), (None,), 0.0)

    def __call__(self, numbers: jax.Array) -> jax.Array:
        """`[n]` numbers of canvases -> `[n, t, rows, M]`."""
        entry = jnp.take(self.table[...], numbers, axis=0, mode="clip").reshape(-1, *self.shape)
        return jnp.tanh(self.gate[...]) * entry


class TileEmbedding(Multiplying):
    """Pixels to tokens: patches, which tile of which canvas they lie in, the class token, positions."""

    placed_whole = True

    def __init__(self, build: Build, config: MllamaVisionConfig):
        layer = config.layer
        self.config = config
        shape = (layer.width, layer.channels, layer.patch_size, layer.patch_size)
        self.weight = weight(build, shape, (axes.EMBED, None, None, None), (shape[1] * shape[2] ** 2) ** -0.5)
        self.cls = weight(build, (layer.width,), (axes.EMBED,), 0.02)
        self.tile = Gated(build, config, 1)
        self.positions = weight(build, (config.patches, layer.width), (None, axes.EMBED), 0.02)
        self.tile_positions = Gated(build, config, config.patches)
        self.norm = LayerNorm(build, layer.width, NORM_EPS, axes.EMBED)

    def __call__(self, pixels: jax.Array, numbers: jax.Array) -> jax.Array:
        """`[n, t, C, height, width]` and `[n]` -> `[n, t, p, M]`."""
        count, tiles = pixels.shape[:2]
        width, size = self.config.layer.width, self.config.layer.patch_size
        flat = patches(pixels.reshape(-1, *pixels.shape[2:]).astype(self.weight.dtype), size)
        x = matmul(flat, self.weight[...].reshape(width, -1), kernel=self.kernel).reshape(count, tiles, -1, width)
        x = x + self.tile(numbers)
        cls = jnp.broadcast_to(self.cls[...], (count, tiles, 1, width))
        x = jnp.concatenate([cls, x], axis=2)
        # One gate weighs both tables of positions.
        gate = jnp.tanh(self.tile_positions.gate[...])
        x = x + (1 - gate) * self.positions[...] + self.tile_positions(numbers)
        return self.norm(x)


class MllamaVisionLayer(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; each times the tanh of a gate where there are gates."""

    def __init__(self, build: Build, config: VisionConfig, *, gated: bool):
        self.attention_norm = LayerNorm(build.at("attention_norm"), config.width, config.norm_eps, axes.EMBED)
        self.attention = VisionAttention(build.at("attention"), config)
        self.mlp_norm = LayerNorm(build.at("mlp_norm"), config.width, config.norm_eps, axes.EMBED)
        self.mlp = MLP(build.at("mlp"), config.width, config.ffn, config.width, config.activation)
        self.attention_gate = constant(build, (1,), (None,), np.pi / 4) if gated else None
        self.mlp_gate = constant(build, (1,), (None,), np.pi / 4) if gated else None

    def __call__(self, x: jax.Array, padding: jax.Array) -> jax.Array:
        """`[n, s, M]` and `[n, s]` -> `[n, s, M]`."""
        x = x + self._gated(self.attention(self.attention_norm(x), padding), self.attention_gate)
        y = self.mlp(self.mlp_norm(x).reshape(-1, x.shape[-1])).reshape(x.shape)
        return x + self._gated(y, self.mlp_gate)

    def _gated(self, y: jax.Array, gate: nnx.Param | None) -> jax.Array:
        return y if gate is None else jnp.tanh(gate[...]) * y


class MllamaVision(nnx.Module):
    """Both transformers."""

    steps = (ENCODE,)

    def __init__(self, build: Build, config: MllamaVisionConfig):
        layer = config.layer
        self.config = config
        self.embedding = TileEmbedding(build.at("embedding"), config)
        self.layers = nnx.List(
            [MllamaVisionLayer(build.at("layers", i), layer, gated=False) for i in range(layer.layers)]
        )
        self.norm = LayerNorm(build.at("norm"), layer.width, NORM_EPS, axes.EMBED)
        self.tile = Gated(build.at("tile"), config, 1)
        self.global_layers = nnx.List(
            [MllamaVisionLayer(build.at("global_layers", i), layer, gated=True) for i in range(config.global_layers)]
        )

    def __call__(self, pixels: jax.Array, numbers: jax.Array) -> jax.Array:
        """Tiles `[n, t, C, height, width]` and the numbers of their canvases `[n]` -> `[n, t, p, width]`."""
        config, count = self.config, pixels.shape[0]
        x = self.embedding(pixels, numbers)
        filled = -config.patches % MULTIPLE
        x = jnp.pad(x, ((0, 0), (0, 0), (0, filled), (0, 0)))
        padding, shape = self._padding(numbers, x.shape[2]), x.shape
        x = x.reshape(count, -1, x.shape[-1])
        kept = {-1: x}
        for number, layer in enumerate(self.layers):
            x = layer(x, padding)
            kept[number] = x
        x = self.norm(x).reshape(shape) + self.tile(numbers)
        x = x.reshape(count, -1, x.shape[-1])
        for layer in self.global_layers:
            x = layer(x, padding)
        # Of each number of the width, those of all layers lie side by side.
        taps = jnp.stack([kept[tap] for tap in config.taps], axis=-1)
        rows = jnp.concatenate([x, taps.reshape(*x.shape[:2], -1)], axis=-1)
        return rows.reshape(*shape[:3], -1)[:, :, : config.patches]

    def _padding(self, numbers: jax.Array, patches: int) -> jax.Array:
        """`[n, t * patches]`: tiles that an image does not have, and what fills up a tile.

        Number 0 is no image, but a step's padding: it gets a tile, so that its numbers are finite.
        """
        own = np.array([1] + [self.config.tiles_of(number + 1) for number in range(len(self.config.ratios))])
        absent = np.arange(self.config.tiles) >= jnp.asarray(own)[numbers][:, None]
        beyond = np.arange(patches) >= self.config.patches
        return (absent[:, :, None] | beyond).reshape(numbers.shape[0], -1)


EMBEDDING = {
    "patch_embedding.weight": "weight",
    "class_embedding": "cls",
    "pre_tile_positional_embedding.embedding.weight": "tile.table",
    "pre_tile_positional_embedding.gate": "tile.gate",
    "gated_positional_embedding.embedding": "positions",
    "gated_positional_embedding.tile_embedding.weight": "tile_positions.table",
    "gated_positional_embedding.gate": "tile_positions.gate",
    "layernorm_pre.weight": "norm.scale",
    "layernorm_pre.bias": "norm.bias",
}
"""Tensors and parameters of `TileEmbedding`."""
REST = {
    "layernorm_post.weight": "norm.scale",
    "layernorm_post.bias": "norm.bias",
    "post_tile_positional_embedding.embedding.weight": "tile.table",
    "post_tile_positional_embedding.gate": "tile.gate",
}
"""The same of the tower beside its layers."""
LAYER = {
    "input_layernorm.weight": "attention_norm.scale",
    "input_layernorm.bias": "attention_norm.bias",
    "post_attention_layernorm.weight": "mlp_norm.scale",
    "post_attention_layernorm.bias": "mlp_norm.bias",
    "self_attn.o_proj.weight": "attention.out.weight",
    "mlp.fc2.weight": "mlp.down.weight",
    "mlp.fc2.bias": "mlp.down.bias",
}
"""The same of a layer, fused ones apart."""
GATES = {"gate_attn": "attention_gate", "gate_ffn": "mlp_gate"}


def weight_rules(config: MllamaVisionConfig) -> list[Rule]:
    """Names and targets within the tower."""
    table = [Rule(source, f"embedding.{target}") for source, target in EMBEDDING.items()]
    table += [Rule(source, target) for source, target in REST.items()]
    for number in range(config.layer.layers):
        table += _layer(f"transformer.layers.{number}", f"layers.{number}", LAYER)
    for number in range(config.global_layers):
        table += _layer(f"global_transformer.layers.{number}", f"global_layers.{number}", LAYER | GATES)
    return table


def _layer(source: str, target: str, names: dict[str, str]) -> Iterator[Rule]:
    for theirs, ours in names.items():
        yield Rule(f"{source}.{theirs}", f"{target}.{ours}")
    for part in ("q", "k", "v"):
        yield Rule(f"{source}.self_attn.{part}_proj.weight", f"{target}.attention.qkv.weight", (part,))
    for leaf in ("weight", "bias"):
        yield Rule(f"{source}.mlp.fc1.{leaf}", f"{target}.mlp.up.{leaf}", ("up",))
