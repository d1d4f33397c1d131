"""Whisper (`WhisperForConditionalGeneration`, arXiv:2212.04356): encoder of log-mel frames and text decoder.

Axis letters beside those of `sharding.axes`: U audio windows in an encoder step, C mel bins, f frames in a window; S =
U * f / 2 encoder positions.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.kernels.attention.paged import KVCache
from jaxinfer.kernels.matmul.choose import matmul
from jaxinfer.kv.spec import Full
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.embedding import Embedding, LearnedPositions
from jaxinfer.layers.encoder import EncodeStep
from jaxinfer.layers.linear import MatmulModule
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.params import Build, constant, weight
from jaxinfer.models.base import Family, FeatureRows
from jaxinfer.models.encoder_decoder import (
    DecoderLayer,
    EncoderLayer,
    both,
    cache_specs,
    cross_parts,
    decode,
    keep_cross,
    layer_rules,
    norm,
)
from jaxinfer.models.whisper.config import STRIDE, WhisperConfig, from_folder, read_config
from jaxinfer.models.whisper.prompt import WhisperReader
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ENCODE


class Convolution(MatmulModule):
    """Convolution over three frames as one matrix product: `[U, f, in]` to `[U, f / stride, out]`."""

    no_split = True

    def __init__(self, build: Build, inputs: int, outputs: int, stride: int):
        self.stride = stride
        self.weight = weight(build, (outputs, inputs, 3), (axes.EMBED, None, None), (3 * inputs) ** -0.5)
        self.bias = constant(build, (outputs,), (axes.EMBED,), 0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve, padded by one zero frame at both ends."""
        count, frames = x.shape[0], x.shape[1] // self.stride
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        seen = [x[:, first : first + self.stride * (frames - 1) + 1 : self.stride] for first in range(3)]
        flat = jnp.stack(seen, axis=-1).reshape(count * frames, -1)
        y = matmul(flat, self.weight[...].reshape(self.weight.shape[0], -1), kernel=self.kernel) + self.bias[...]
        return y.reshape(count, frames, -1)


class Encoder(nnx.Module):
    """Audio encoder."""

    steps = (ENCODE,)

    def __init__(self, build: Build, config: WhisperConfig):
        width = config.width
        self.conv1 = Convolution(build.at("conv1"), config.bins, width, 1)
        self.conv2 = Convolution(build.at("conv2"), width, width, STRIDE)
        self.positions = weight(build, (config.encoder.positions, width), (None, axes.EMBED), 0.02)
        self.layers = nnx.List(
            [EncoderLayer(build.at("layers", i), config, config.encoder) for i in range(config.encoder.layers)]
        )
        self.norm = norm(build.at("norm"), width)

    def __call__(self, frames: jax.Array, step: EncodeStep) -> jax.Array:
        """Encode log-mel frames `[U, C, f]` to `[S, M]`."""
        x = frames.astype(self.positions.dtype).swapaxes(1, 2)
        for convolution in (self.conv1, self.conv2):
            x = ACTIVATIONS["gelu"](convolution(x))
        x = (x + self.positions[...]).reshape(-1, x.shape[-1])
        for layer in self.layers:
            x = layer(x, step)
        return self.norm(x)


class Whisper(nnx.Module):
    """Whisper encoder and decoder. `cache_specs` lists self-attentions first, then cross-attentions."""

    def __init__(self, build: Build, config: WhisperConfig):
        self.config, self.mesh = config, build.mesh
        self.encoder = Encoder(build.at("encoder"), config)
        sizes = config.vocab_size, config.width
        # A table used for lookups only gains nothing from int8.
        lookup = build if config.tied else build._replace(quantization=None)
        self.embedding = Embedding(lookup.at("embedding"), *sizes, head=config.tied)
        self.positions = LearnedPositions(build.at("positions"), config.decoder.positions, config.width)
        self.layers = nnx.List(
            [DecoderLayer(build.at("layers", i), config, config.decoder) for i in range(config.decoder.layers)]
        )
        self.norm = norm(build.at("norm"), config.width)
        self.head = None if config.tied else Embedding(build.at("head"), *sizes, lookup=False, head=True)

    def encode_cross(
        self, inputs: jax.Array, numbers: jax.Array, step: EncodeStep, cache: list[KVCache]
    ) -> list[KVCache]:
        """Encode windows `[U, C, f]` into the cache's cross-attention keys and values; `numbers` is empty."""
        return keep_cross(cross_parts(self.layers), self.encoder(inputs, step), cache, step)

    def __call__(
        self, tokens: jax.Array, step: StepContext, cache: list[KVCache], features: FeatureRows | None = None
    ) -> tuple[jax.Array, list[KVCache]]:
        """Compute hidden states `[T, M]` after the final norm for token ids `[T]`; also return the new cache arrays."""
        x = self.embedding(tokens) + self.positions(step.positions)
        x, cache = decode(self.layers, x, cache, step)
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute float32 logits `[B, V']` of hidden states `[B, M]`."""
        return (self.embedding if self.head is None else self.head).logits(hidden)

    def cache_specs(self) -> Sequence[Full]:
        """Return what self-attentions cache, then what cross-attentions cache."""
        return cache_specs(self.layers)


def weight_rules(config: WhisperConfig) -> list[Rule]:
    """Return the weight rules of all tensors, which have the same names on the Hub and in transformers."""
    encoder = [
        *both("conv1", "conv1"),
        *both("conv2", "conv2"),
        *both("layer_norm", "norm"),
        Rule("embed_positions.weight", "positions"),
        *layer_rules("layers", "layers", config.encoder.layers, config.biases, cross=False),
    ]
    decoder = [
        Rule("embed_tokens.weight", "embedding.weight"),
        Rule("embed_positions.weight", "positions.weight"),
        *both("layer_norm", "norm"),
        *layer_rules("layers", "layers", config.decoder.layers, config.biases, cross=True),
    ]
    return [
        *(Rule(f"model.encoder.{r.source}", f"encoder.{r.target}", r.parts) for r in encoder),
        *(Rule(f"model.decoder.{r.source}", r.target, r.parts) for r in decoder),
        Rule("proj_out.weight", "embedding.weight", tied="head")
        if config.tied
        else Rule("proj_out.weight", "head.weight"),
    ]


FAMILY = Family(
    {"WhisperForConditionalGeneration": "whisper"},
    read_config,
    Whisper,
    weight_rules,
    from_folder,
    reader=WhisperReader,
)
