"""Whisper (`WhisperForConditionalGeneration`, arXiv:2212.04356): encoder of log-mel frames and text decoder.

Axis letters beside those of `sharding.axes`: U audio windows in an encoder step, C mel bins, f frames in a window; S =
U * f / 2 encoder positions.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.checkpoint.rules import Rule, expand
from jaxinfer.kernels.attention.paged import Lane
from jaxinfer.kernels.matmul.choose import matmul
from jaxinfer.kv.spec import Full
from jaxinfer.layers.attention import Attention, AttentionSpec, StepContext
from jaxinfer.layers.cross import CrossAttention, CrossSpec
from jaxinfer.layers.embedding import Embedding, LearnedPositions
from jaxinfer.layers.encoder import EncoderAttention, EncodeStep
from jaxinfer.layers.linear import Multiplying
from jaxinfer.layers.mlp import ACTIVATIONS, MLP
from jaxinfer.layers.norms import LayerNorm
from jaxinfer.layers.params import Build, constant, weight
from jaxinfer.models.base import Family, FeatureRows
from jaxinfer.models.whisper.config import STRIDE, WhisperConfig, from_folder, read_config
from jaxinfer.models.whisper.prompt import WhisperReader
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ENCODE

NORM_EPS = 1e-5
BIASED = ("q", "v")
"""Projections with a bias; keys have none."""


class Convolution(Multiplying):
    """Convolution over three frames as one matrix product: `[U, f, in]` to `[U, f / stride, out]`."""

    placed_whole = True

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


class EncoderLayer(nnx.Module):
    """Encoder layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, build: Build, config: WhisperConfig):
        stack, width = config.encoder, config.width
        self.attention_norm = LayerNorm(build.at("attention_norm"), width, NORM_EPS, axes.EMBED)
        self.attention = EncoderAttention(
            build.at("attention"), width, stack.heads, width // stack.heads, biases=BIASED
        )
        self.mlp_norm = LayerNorm(build.at("mlp_norm"), width, NORM_EPS, axes.EMBED)
        self.mlp = MLP(build.at("mlp"), width, stack.ffn, width, config.activation)

    def __call__(self, x: jax.Array, step: EncodeStep) -> jax.Array:
        """Map hidden states `[S, M]` to `[S, M]`."""
        x = x + self.attention(self.attention_norm(x), step)
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nnx.Module):
    """Audio encoder."""

    steps = (ENCODE,)

    def __init__(self, build: Build, config: WhisperConfig):
        width = config.width
        self.conv1 = Convolution(build.at("conv1"), config.bins, width, 1)
        self.conv2 = Convolution(build.at("conv2"), width, width, STRIDE)
        self.positions = weight(build, (config.encoder.positions, width), (None, axes.EMBED), 0.02)
        self.layers = nnx.List([EncoderLayer(build.at("layers", i), config) for i in range(config.encoder.layers)])
        self.norm = LayerNorm(build.at("norm"), width, NORM_EPS, axes.EMBED)

    def __call__(self, frames: jax.Array, step: EncodeStep) -> jax.Array:
        """Encode log-mel frames `[U, C, f]` to `[S, M]`."""
        x = frames.astype(self.positions.dtype).swapaxes(1, 2)
        for convolution in (self.conv1, self.conv2):
            x = ACTIVATIONS["gelu"](convolution(x))
        x = (x + self.positions[...]).reshape(-1, x.shape[-1])
        for layer in self.layers:
            x = layer(x, step)
        return self.norm(x)


class DecoderLayer(nnx.Module):
    """Decoder layer: self-attention, cross-attention, then the MLP, each as `x + f(norm(x))`."""

    def __init__(self, build: Build, config: WhisperConfig):
        stack, width = config.decoder, config.width
        head_dim = width // stack.heads
        own = AttentionSpec(width, stack.heads, stack.heads, head_dim, qkv_bias=BIASED, out_bias=True)
        other = CrossSpec(width, stack.heads, stack.heads, head_dim, biases=BIASED, out_bias=True)
        self.attention_norm = LayerNorm(build.at("attention_norm"), width, NORM_EPS, axes.EMBED)
        self.attention = Attention(build.at("attention"), own)
        self.cross_norm = LayerNorm(build.at("cross_norm"), width, NORM_EPS, axes.EMBED)
        self.cross = CrossAttention(build.at("cross"), other)
        self.mlp_norm = LayerNorm(build.at("mlp_norm"), width, NORM_EPS, axes.EMBED)
        self.mlp = MLP(build.at("mlp"), width, stack.ffn, width, config.activation)


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
        self.layers = nnx.List([DecoderLayer(build.at("layers", i), config) for i in range(config.decoder.layers)])
        self.norm = LayerNorm(build.at("norm"), config.width, NORM_EPS, axes.EMBED)
        self.head = None if config.tied else Embedding(build.at("head"), *sizes, lookup=False, head=True)

    def encode_cross(self, inputs: jax.Array, numbers: jax.Array, step: EncodeStep, lanes: list[Lane]) -> list[Lane]:
        """Encode windows `[U, C, f]` into the cache's cross-attention keys and values; `numbers` is empty."""
        encoded, lanes = self.encoder(inputs, step), list(lanes)
        for number, layer in enumerate(self.layers, len(self.layers)):
            lane = step.lane(number)
            lanes[lane] = layer.cross.keep(encoded, lanes[lane], step.of(number))
        return lanes

    def __call__(
        self, tokens: jax.Array, step: StepContext, lanes: list[Lane], features: FeatureRows | None = None
    ) -> tuple[jax.Array, list[Lane]]:
        """Compute hidden states `[T, M]` after the final norm for token ids `[T]`; also return the new cache arrays."""
        x = self.embedding(tokens) + self.positions(step.positions)
        lanes = list(lanes)
        for number, layer in enumerate(self.layers):
            lane = step.lane(number)
            y, lanes[lane] = layer.attention(layer.attention_norm(x), lanes[lane], None, step.of(number))
            x = x + y
            number += len(self.layers)
            lane = step.lane(number)
            y, lanes[lane] = layer.cross(layer.cross_norm(x), lanes[lane], step.of(number))
            x = x + y
            x = x + layer.mlp(layer.mlp_norm(x))
        return self.norm(x), lanes

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute float32 logits `[B, V']` of hidden states `[B, M]`."""
        return (self.embedding if self.head is None else self.head).attend(hidden)

    def cache_specs(self) -> Sequence[Full]:
        """Return what self-attentions cache, then what cross-attentions cache."""
        parts = [layer.attention for layer in self.layers], [layer.cross for layer in self.layers]
        return [part.cache_spec for each in parts for part in each]


def weight_rules(config: WhisperConfig) -> list[Rule]:
    """Return the weight rules of all tensors, which have the same names on the Hub and in transformers."""
    own, cross = "attention.qkv", "cross.qkv"
    both = [
        *_attention("self_attn", "attention", dict.fromkeys("qkv", own)),
        *_norm("self_attn_layer_norm", "attention_norm"),
        *_norm("final_layer_norm", "mlp_norm"),
        *_linear("fc1", "mlp.up", ("up",)),
        *_linear("fc2", "mlp.down"),
    ]
    only_decoder = [
        *_attention("encoder_attn", "cross", {"q": f"{cross}.q", "k": f"{cross}.kv", "v": f"{cross}.kv"}),
        *_norm("encoder_attn_layer_norm", "cross_norm"),
    ]
    encoder = [
        *_linear("conv1", "conv1"),
        *_linear("conv2", "conv2"),
        *_norm("layer_norm", "norm"),
        Rule("embed_positions.weight", "positions"),
        *_in_layers(both, config.encoder.layers),
    ]
    decoder = [
        Rule("embed_tokens.weight", "embedding.weight"),
        Rule("embed_positions.weight", "positions.weight"),
        *_norm("layer_norm", "norm"),
        *_in_layers(both + only_decoder, config.decoder.layers),
    ]
    return [
        *(Rule(f"model.encoder.{r.source}", f"encoder.{r.target}", r.parts) for r in encoder),
        *(Rule(f"model.decoder.{r.source}", r.target, r.parts) for r in decoder),
        Rule("proj_out.weight", "embedding.weight", tied="head")
        if config.tied
        else Rule("proj_out.weight", "head.weight"),
    ]


def _linear(source: str, target: str, parts: tuple[str, ...] = ()) -> list[Rule]:
    return [Rule(f"{source}.{leaf}", f"{target}.{leaf}", parts) for leaf in ("weight", "bias")]


def _norm(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")]


def _attention(source: str, target: str, fused: Mapping[str, str]) -> list[Rule]:
    table = _linear(f"{source}.out_proj", f"{target}.out")
    for part, projection in fused.items():
        rules = _linear(f"{source}.{part}_proj", projection, (part,))
        table += rules if part in BIASED else rules[:1]
    return table


def _in_layers(table: Sequence[Rule], layers: int) -> list[Rule]:
    return expand([Rule(f"layers.{{i}}.{r.source}", f"layers.{{i}}.{r.target}", r.parts) for r in table], layers)


FAMILY = Family(read_config, Whisper, weight_rules, from_folder, reader=WhisperReader)
