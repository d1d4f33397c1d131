"""Vision tower of Llama 3.2 Vision (arXiv:2407.21783, section 7): an image as tiles of one canvas.

A transformer reads each image as one sequence of the patches of all its tiles, followed by a second, gated one. The
outputs of some layers of the first one are concatenated to the result in every row. Axis letters beside those of
`sharding.axes`: n images, t maximum number of tiles per image, C channels, p patches of a tile including its class
token.

Tiles that an image does not have, and zeros that pad a tile's patches to a multiple of 8, take part in attention as in
the original: patches see them, but they do not see each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.kernels.matmul.choose import matmul
from jaxinfer.layers.linear import MatmulModule
from jaxinfer.layers.mlp import MLP
from jaxinfer.layers.norms import LayerNorm
from jaxinfer.layers.params import Build, constant, weight
from jaxinfer.layers.vision import VisionAttention, VisionConfig, patches
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ENCODE

MULTIPLE = 8
"""The padded number of patches of a tile is a multiple of this."""
NORM_EPS = 1e-5
"""Epsilon of the norms before and after the first transformer, whatever that of its layers is."""


@dataclass(frozen=True)
class MllamaVisionConfig:
    """Shape and options of the vision tower."""

    layer: VisionConfig
    """Layers of both transformers, and patches; `layers` is the number of layers of the first."""
    global_layers: int
    """Number of layers of the second transformer."""
    ratios: tuple[tuple[int, int], ...]
    """Canvases in tiles, `(down, across)`; canvas ids count from 1."""
    tiles: int
    """t: maximum number of tiles."""
    taps: tuple[int, ...]
    """Layers of the first transformer whose outputs are concatenated; -1 for the input of the first layer."""

    @property
    def patches(self) -> int:
        """p: number of patches of a tile, with the class token."""
        return self.layer.grid**2 + 1

    @property
    def width(self) -> int:
        """Width of the tower's output rows."""
        return self.layer.width * (1 + len(self.taps))

    def tiles_of(self, number: int) -> int:
        """Return the number of tiles of a canvas id."""
        down, across = self.ratios[number - 1]
        return down * across


class Gated(nnx.Module):
    """Embedding table indexed by canvas id, scaled by the tanh of a gate."""

    def __init__(self, build: Build, config: MllamaVisionConfig, rows: int):
        self.shape = (config.tiles, rows, config.layer.width)
        size = config.tiles * rows * config.layer.width
        self.table = weight(build, (len(config.ratios) + 1, size), (None, axes.EMBED), 0.02)
        self.gate = constant(build, (1,), (None,), 0.0)

    def __call__(self, numbers: jax.Array) -> jax.Array:
        """Look up canvas ids `[n]`; returns `[n, t, rows, M]`."""
        entry = jnp.take(self.table[...], numbers, axis=0, mode="clip").reshape(-1, *self.shape)
        return jnp.tanh(self.gate[...]) * entry


class TileEmbedding(MatmulModule):
    """Embedding of pixels: patches, tile and canvas, class token, positions."""

    no_split = True

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
        """Embed pixels `[n, t, C, height, width]` with canvas ids `[n]`; returns `[n, t, p, M]`."""
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
    """Vision layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`, with tanh gates in the second transformer."""

    def __init__(self, build: Build, config: VisionConfig, *, gated: bool):
        self.attention_norm = LayerNorm(build.at("attention_norm"), config.width, config.norm_eps, axes.EMBED)
        self.attention = VisionAttention(build.at("attention"), config)
        self.mlp_norm = LayerNorm(build.at("mlp_norm"), config.width, config.norm_eps, axes.EMBED)
        self.mlp = MLP(build.at("mlp"), config.width, config.ffn, config.width, config.activation)
        self.attention_gate = constant(build, (1,), (None,), np.pi / 4) if gated else None
        self.mlp_gate = constant(build, (1,), (None,), np.pi / 4) if gated else None

    def __call__(self, x: jax.Array, padding: jax.Array) -> jax.Array:
        """Map `[n, s, M]` with padding mask `[n, s]` to `[n, s, M]`."""
        x = x + self._gated(self.attention(self.attention_norm(x), padding), self.attention_gate)
        y = self.mlp(self.mlp_norm(x).reshape(-1, x.shape[-1])).reshape(x.shape)
        return x + self._gated(y, self.mlp_gate)

    def _gated(self, y: jax.Array, gate: nnx.Param | None) -> jax.Array:
        return y if gate is None else jnp.tanh(gate[...]) * y


class MllamaVision(nnx.Module):
    """Vision tower: both transformers."""

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
        """Encode tiles `[n, t, C, height, width]` with canvas ids `[n]` to `[n, t, p, width]`."""
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
        # For each column of the width, the values of all kept layers are adjacent.
        taps = jnp.stack([kept[tap] for tap in config.taps], axis=-1)
        rows = jnp.concatenate([x, taps.reshape(*x.shape[:2], -1)], axis=-1)
        return rows.reshape(*shape[:3], -1)[:, :, : config.patches]

    def _padding(self, numbers: jax.Array, patches: int) -> jax.Array:
        """Return the padding mask `[n, t * patches]`: absent tiles, and padding within a tile.

        Canvas id 0 marks padding of the step: it gets one tile, so that its values are finite.
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
"""Parameters of `TileEmbedding` by tensor name."""
REST = {
    "layernorm_post.weight": "norm.scale",
    "layernorm_post.bias": "norm.bias",
    "post_tile_positional_embedding.embedding.weight": "tile.table",
    "post_tile_positional_embedding.gate": "tile.gate",
}
"""Parameters of the tower outside of its layers by tensor name."""
LAYER = {
    "input_layernorm.weight": "attention_norm.scale",
    "input_layernorm.bias": "attention_norm.bias",
    "post_attention_layernorm.weight": "mlp_norm.scale",
    "post_attention_layernorm.bias": "mlp_norm.bias",
    "self_attn.o_proj.weight": "attention.out.weight",
    "mlp.fc2.weight": "mlp.down.weight",
    "mlp.fc2.bias": "mlp.down.bias",
}
"""Parameters of a layer by tensor name, except fused ones."""
GATES = {"gate_attn": "attention_gate", "gate_ffn": "mlp_gate"}


def weight_rules(config: MllamaVisionConfig) -> list[Rule]:
    """Return the weight rules of the tower, with names and targets relative to it."""
    table = [Rule(source, f"embedding.{target}") for source, target in EMBEDDING.items()]
    table += [Rule(source, target) for source, target in REST.items()]
    for number in range(config.layer.layers):
        table += _layer(f"transformer.layers.{number}", f"layers.{number}", LAYER)
    for number in range(config.global_layers):
        table += _layer(f"global_transformer.layers.{number}", f"global_layers.{number}", LAYER | GATES)
    return table


def _layer(source: str, target: str, names: dict[str, str]) -> Iterator[Rule]:
    for hf_name, own_name in names.items():
        yield Rule(f"{source}.{hf_name}", f"{target}.{own_name}")
    for part in ("q", "k", "v"):
        yield Rule(f"{source}.self_attn.{part}_proj.weight", f"{target}.attention.qkv.weight", (part,))
    for leaf in ("weight", "bias"):
        yield Rule(f"{source}.mlp.fc1.{leaf}", f"{target}.mlp.up.{leaf}", ("up",))
