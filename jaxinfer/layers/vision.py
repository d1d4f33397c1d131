"""Vision transformer over image tiles: InternViT (arXiv:2312.14238), a ViT (arXiv:2010.11929) with options.

Axes beside those of `sharding.axes`: n tiles, C channels, t = 1 + g * g tokens of a tile of g by g patches, the first
of them the CLS token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention.whole import attend_whole
from jaxinfer.kernels.matmul.choose import matmul
from jaxinfer.layers.attending import AttentionModule
from jaxinfer.layers.heads import HeadLayout
from jaxinfer.layers.linear import FusedLinear, MatmulModule, RowLinear
from jaxinfer.layers.mlp import MLP
from jaxinfer.layers.norms import LayerNorm, RMSNorm, normalise_together
from jaxinfer.layers.params import Build, constant, weight
from jaxinfer.layers.sharded import model_axis, on_shards
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ALL_REDUCE, ENCODE, Collective

NORMS: Mapping[str, Callable[..., nnx.Module]] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}
"""Norm classes by Hugging Face's `norm_type` names."""


@dataclass(frozen=True)
class VisionConfig:
    """Configuration of a vision tower."""

    width: int
    """M of the tower."""
    layers: int
    """Layers to compute; a checkpoint may have more."""
    heads: int
    """H; divides the width."""
    ffn: int
    """F."""
    activation: str
    channels: int
    """C."""
    image_size: int
    """Side, in pixels, of the images that the learned positions are for."""
    patch_size: int
    """Side of a patch, in pixels."""
    norm: str
    """One of `NORMS`."""
    norm_eps: float
    qkv_bias: bool = False
    qk_norm_eps: float | None = None
    """Epsilon of an RMSNorm of queries and keys over the whole width, before the split into heads; None for no norm."""
    positions: bool = True
    """Whether patches have learned positions."""
    final_norm: bool = False
    """Whether a LayerNorm follows the last layer."""
    out_bias: bool = True
    """Whether attention's output projection has a bias."""

    @property
    def grid(self) -> int:
        """Patches per side of an image of `image_size`."""
        return self.image_size // self.patch_size


class PatchEmbedding(MatmulModule):
    """Embed pixels as tokens: CLS token, patches and learned positions."""

    no_split = True

    def __init__(self, build: Build, config: VisionConfig):
        self.config = config
        # Same shape as the convolution weight in the checkpoint.
        shape = (config.width, config.channels, config.patch_size, config.patch_size)
        self.weight = weight(build, shape, (axes.EMBED, None, None, None), (shape[1] * shape[2] ** 2) ** -0.5)
        self.bias = constant(build, shape[:1], (axes.EMBED,), 0.0)
        names = (None, None, axes.EMBED)
        self.cls = weight(build, (1, 1, config.width), names, 0.02)
        places = (1, 1 + config.grid**2, config.width)
        self.positions = weight(build, places, names, 0.02) if config.positions else None

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Map pixels `[n, C, height, width]`, of whole patches, to `[n, t, M]`."""
        count, size = pixels.shape[0], self.config.patch_size
        grid = pixels.shape[2] // size, pixels.shape[3] // size
        kernel = self.weight[...].reshape(self.config.width, -1)
        x = matmul(patches(pixels.astype(self.weight.dtype), size), kernel, kernel=self.kernel) + self.bias[...]
        x = x.reshape(count, -1, self.config.width)
        cls = jnp.broadcast_to(self.cls[...], (count, 1, self.config.width))
        x = jnp.concatenate([cls, x], axis=1)
        return x if self.positions is None else x + self._positions(grid)

    def _positions(self, grid: tuple[int, int]) -> jax.Array:
        """Return positions `[1, t, M]` for a grid, resampled bicubically if it differs from the checkpoint's."""
        learned, side = self.positions[...], self.config.grid
        if grid == (side, side):
            return learned
        down, across = (jnp.asarray(bicubic(side, new)) for new in grid)
        table = learned[0, 1:].astype(jnp.float32).reshape(side, side, -1)
        table = jnp.einsum("ih,jw,hwm->ijm", down, across, table, precision=jax.lax.Precision.HIGHEST)
        table = table.reshape(1, grid[0] * grid[1], -1).astype(learned.dtype)
        return jnp.concatenate([learned[:, :1], table], axis=1)


def patches(pixels: jax.Array, size: int) -> jax.Array:
    """Cut `[n, C, height, width]` into patches `[n * patches, C * size * size]`, row-major, as a convolution does."""
    count, channels, height, width = pixels.shape
    pixels = pixels.reshape(count, channels, height // size, size, width // size, size)
    return pixels.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * size * size)


def bicubic(old: int, new: int) -> np.ndarray:
    """Compute the matrix `[new, old]` float32 that resamples `old` points to `new`.

    Cubic convolution (R. Keys, 1981) with a = -0.75, half-pixel centers and edge replication, equal to
    `torch.nn.functional.interpolate` with mode "bicubic", align_corners false and no antialiasing.
    """
    a, made = -0.75, np.zeros((new, old))
    for row in range(new):
        at = (row + 0.5) * old / new - 0.5
        first = int(np.floor(at))
        for place in range(first - 1, first + 3):
            x = abs(at - place)
            near = ((a + 2) * x - (a + 3)) * x * x + 1
            far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
            made[row, min(max(place, 0), old - 1)] += near if x <= 1 else far
    return made.astype(np.float32)


class VisionAttention(AttentionModule):
    """Bidirectional attention, optionally with q/k norms over the whole width."""

    no_split = True

    def __init__(self, build: Build, config: VisionConfig):
        self.mesh, self.config = build.mesh, config
        outputs = HeadLayout.of(build, config.heads, config.heads).outputs(config.width // config.heads)
        self.qkv = FusedLinear(build, config.width, outputs, bias=config.qkv_bias)
        self.out = RowLinear(build, axes.HEADS, outputs[0], config.width, bias=config.out_bias)
        # Scales of q, then of k, sharded like their columns.
        shape = (build.tp, sum(output.columns(build.tp) for output in outputs[:2]))
        scale = constant(build, shape, (axes.SHARD, axes.COLUMNS), 1.0, outputs=outputs[:2])
        self.norm_scale = None if config.qk_norm_eps is None else scale

    def collectives(self) -> list[Collective]:
        """Return the all-reduce of the q/k norm if its width is sharded."""
        if self.norm_scale is None or self.norm_scale.shape[0] == 1:
            return []
        return [Collective(ALL_REDUCE, "squares of q and k", 2, itemsize=4)]

    def __call__(self, x: jax.Array, padding: jax.Array | None = None) -> jax.Array:
        """Map `[n, t, M]` to `[n, t, M]`; `padding` `[n, t]` as in `attend_whole`."""
        q, k, v = self.qkv(x.reshape(-1, x.shape[-1]))
        scale = None if self.norm_scale is None else self.norm_scale[...]
        return self.out(self._attend(q, k, v, scale, x.shape[1], padding)).reshape(x.shape)

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array | None, tokens: int, padding: jax.Array | None
    ) -> jax.Array:
        """Attend with q, k and v `[n * t, tp, columns]`.

        Runs on local shapes in `jax.shard_map`: each device has whole heads of whole tiles, so there are no
        collectives.
        """
        divided, head_dim = q.shape[1] > 1, self.config.width // self.config.heads
        how: dict[str, Any] = {"unrolled": self.mesh.devices.flat[0].platform != "cpu"}
        if self.attention_kernel == attention.TRITON:
            how["triton"] = attention.implementation(attention.TRITON, self.mesh)

        def local(
            q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array | None, padding: jax.Array | None
        ) -> jax.Array:
            if scale is not None:
                widths = [self.config.width] * 2
                over = axes.MODEL if divided else None
                q, k = normalise_together((q, k), scale, widths, self.config.qk_norm_eps, over=over)
            q, k, v = (y.reshape(-1, tokens, y.shape[-1] // head_dim, head_dim) for y in (q, k, v))
            return attend_whole(q, k, v, padding, **how).reshape(q.shape[0] * tokens, 1, -1)

        data, model = axes.DATA if axes.DATA in self.mesh.shape else None, model_axis(q.shape[1])
        rows = PartitionSpec(data, model)
        specs = rows, rows, rows, PartitionSpec(model), PartitionSpec(data)
        return on_shards(local, self.mesh, specs, rows, q, k, v, scale, padding)


class VisionLayer(nnx.Module):
    """`x + a * attention(norm(x))`, then `x + b * mlp(norm(x))`: a ViT block with LayerScale (arXiv:2103.17239)."""

    def __init__(self, build: Build, config: VisionConfig):
        norm, width = NORMS[config.norm], config.width
        self.attention_norm = norm(build.at("attention_norm"), width, config.norm_eps, axes.EMBED)
        self.attention = VisionAttention(build.at("attention"), config)
        self.attention_scale = constant(build, (width,), (axes.EMBED,), 0.1)
        self.mlp_norm = norm(build.at("mlp_norm"), width, config.norm_eps, axes.EMBED)
        self.mlp = MLP(build.at("mlp"), width, config.ffn, width, config.activation)
        self.mlp_scale = constant(build, (width,), (axes.EMBED,), 0.1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[n, t, M]` to `[n, t, M]`."""
        x = x + self.attention_scale[...] * self.attention(self.attention_norm(x))
        y = self.mlp(self.mlp_norm(x).reshape(-1, x.shape[-1])).reshape(x.shape)
        return x + self.mlp_scale[...] * y


class VisionTower(nnx.Module):
    """Patch embedding, layers and an optional final LayerNorm."""

    steps = (ENCODE,)

    def __init__(self, build: Build, config: VisionConfig):
        self.embedding = PatchEmbedding(build.at("embedding"), config)
        self.layers = nnx.List([VisionLayer(build.at("layers", i), config) for i in range(config.layers)])
        final = LayerNorm(build.at("norm"), config.width, config.norm_eps, axes.EMBED) if config.final_norm else None
        self.norm = final

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Map pixels `[n, C, height, width]` to `[n, t, M]`."""
        x = self.embedding(pixels)
        for layer in self.layers:
            x = layer(x)
        return x if self.norm is None else self.norm(x)


def divide(inputs: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    """Shard `[n, ...]` over the mesh axis `data`, if there is one, padding with zeros until it divides: `[n', ...]`."""
    if axes.DATA not in mesh.shape:
        return inputs
    missing = -inputs.shape[0] % mesh.shape[axes.DATA]
    inputs = jnp.pad(inputs, ((0, missing), *[(0, 0)] * (inputs.ndim - 1)))
    return jax.lax.with_sharding_constraint(inputs, NamedSharding(mesh, PartitionSpec(axes.DATA)))


def gather(rows: jax.Array, count: int, mesh: jax.sharding.Mesh) -> jax.Array:
    """Replicate the first `count` results of inputs sharded by `divide`."""
    if axes.DATA not in mesh.shape:
        return rows
    return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec()))[:count]
