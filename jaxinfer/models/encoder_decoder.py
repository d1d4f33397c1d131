"""Layers of encoder-decoder Transformers (BART, mBART, Whisper), and the loops that models with cross-attention share.

`cache_specs` lists the self-attentions of all layers first, then their cross-attentions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
from flax import nnx

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.weight_table import Rule, expand
from jaxinfer.kernels.attention.paged import KVCache
from jaxinfer.kv.spec import Full
from jaxinfer.layers.attention import Attention, AttentionSpec, StepContext
from jaxinfer.layers.cross import CrossAttention, CrossSpec
from jaxinfer.layers.encoder import EncoderAttention, EncodeStep
from jaxinfer.layers.mlp import MLP
from jaxinfer.layers.norms import LayerNorm
from jaxinfer.layers.params import Build
from jaxinfer.sharding import axes

NORM_EPS = 1e-5


@dataclass(frozen=True)
class StackConfig:
    """Layers of the encoder or of the decoder."""

    layers: int
    heads: int
    """H: number of heads."""
    ffn: int
    """F: feed-forward width."""
    positions: int
    """Maximum number of positions."""


@runtime_checkable
class LayerConfig(Protocol):
    """Settings that all layers of a model share."""

    @property
    def width(self) -> int:
        """M: width of encoder and decoder."""

    @property
    def activation(self) -> str:
        """Activation of the MLPs."""

    @property
    def norm_first(self) -> bool:
        """Whether layers are pre-norm."""

    @property
    def biases(self) -> tuple[str, ...]:
        """Those of the projections "q", "k" and "v" that have a bias."""


def read_stack(reader: ConfigReader, name: str, width: int, positions: str) -> StackConfig:
    """Read the sizes of the "encoder" or the "decoder".

    Args:
        reader: config.json.
        name: the prefix of the fields.
        width: M.
        positions: the field with the maximum number of positions.

    Raises:
        ConfigError: the heads do not divide the width.
    """
    heads = reader.get_int(f"{name}_attention_heads")
    reader.divide("d_model", width, f"{name}_attention_heads", heads)
    layers, ffn = reader.get_int(f"{name}_layers"), reader.get_int(f"{name}_ffn_dim")
    return StackConfig(layers, heads, ffn, reader.get_int(positions))


def norm(build: Build, width: int) -> LayerNorm:
    """Build a layer norm with the epsilon of these models."""
    return LayerNorm(build, width, NORM_EPS, axes.EMBED)


class Residual(nnx.Module):
    """Layer base class: `x + f(norm(x))` where `norm_first`, else `norm(x + f(x))`."""

    def __init__(self, build: Build, config: LayerConfig, stack: StackConfig):
        self.first = config.norm_first
        self.attention_norm = norm(build.at("attention_norm"), config.width)
        self.mlp_norm = norm(build.at("mlp_norm"), config.width)
        self.mlp = MLP(build.at("mlp"), config.width, stack.ffn, config.width, config.activation)

    def before(self, x: jax.Array, norm: LayerNorm) -> jax.Array:
        """Compute the input of f."""
        return norm(x) if self.first else x

    def after(self, x: jax.Array, y: jax.Array, norm: LayerNorm) -> jax.Array:
        """Add the output y of f to x."""
        return x + y if self.first else norm(x + y)

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """Apply the MLP: `[T, M]` to `[T, M]`."""
        return self.after(x, self.mlp(self.before(x, self.mlp_norm)), self.mlp_norm)


class EncoderLayer(Residual):
    """Bidirectional attention, then the MLP."""

    def __init__(self, build: Build, config: LayerConfig, stack: StackConfig):
        super().__init__(build, config, stack)
        head_dim = config.width // stack.heads
        self.attention = EncoderAttention(
            build.at("attention"), config.width, stack.heads, head_dim, biases=config.biases
        )

    def __call__(self, x: jax.Array, step: EncodeStep) -> jax.Array:
        """Map `[S, M]` to `[S, M]`."""
        y = self.attention(self.before(x, self.attention_norm), step)
        return self.feed_forward(self.after(x, y, self.attention_norm))


class DecoderLayer(Residual):
    """Causal self-attention, cross-attention to the encoder, then the MLP."""

    def __init__(self, build: Build, config: LayerConfig, stack: StackConfig):
        super().__init__(build, config, stack)
        shape = (config.width, stack.heads, stack.heads, config.width // stack.heads)
        own = AttentionSpec(*shape, qkv_bias=config.biases, out_bias=True)
        self.attention = Attention(build.at("attention"), own)
        self.cross_norm = norm(build.at("cross_norm"), config.width)
        self.cross = CrossAttention(build.at("cross"), CrossSpec(*shape, biases=config.biases, out_bias=True))

    def __call__(
        self, x: jax.Array, cache: list[KVCache], own: int, read: int, step: StepContext
    ) -> tuple[jax.Array, list[KVCache]]:
        """Map `[T, M]` to `[T, M]`; also return the new cache arrays.

        Args:
            x: hidden states.
            cache: cache arrays.
            own: index of the self-attention in `cache_specs`.
            read: index of the cross-attention in `cache_specs`.
            step: the step.
        """
        cache, index = list(cache), step.array_index(own)
        y, cache[index] = self.attention(self.before(x, self.attention_norm), cache[index], None, step.of(own))
        x, index = self.after(x, y, self.attention_norm), step.array_index(read)
        y, cache[index] = self.cross(self.before(x, self.cross_norm), cache[index], step.of(read))
        return self.feed_forward(self.after(x, y, self.cross_norm)), cache


def decode(
    layers: Sequence[DecoderLayer], x: jax.Array, cache: list[KVCache], step: StepContext
) -> tuple[jax.Array, list[KVCache]]:
    """Apply all decoder layers to `[T, M]`; also return the new cache arrays."""
    for number, layer in enumerate(layers):
        x, cache = layer(x, cache, number, number + len(layers), step)
    return x, cache


def keep_cross(
    parts: Iterable[tuple[int, CrossAttention]], encoded: jax.Array, cache: list[KVCache], step: EncodeStep
) -> list[KVCache]:
    """Return the cache arrays with the keys and values of an encoder's output.

    Args:
        parts: cross-attentions with their indices in `cache_specs`.
        encoded: the encoder's output, `[S, M]`.
        cache: cache arrays.
        step: the encoder step.
    """
    cache = list(cache)
    for number, part in parts:
        index = step.array_index(number)
        cache[index] = part.keep(encoded, cache[index], step.of(number))
    return cache


def cross_parts(layers: Sequence[DecoderLayer]) -> Iterable[tuple[int, CrossAttention]]:
    """Return the cross-attentions of the layers with their indices in `cache_specs`."""
    return ((number, layer.cross) for number, layer in enumerate(layers, len(layers)))


def cache_specs(layers: Sequence[DecoderLayer]) -> list[Full]:
    """Return what self-attentions cache, then what cross-attentions cache."""
    return [layer.attention.cache_spec for layer in layers] + [layer.cross.cache_spec for layer in layers]


NAMES: Mapping[str, str] = {
    "self_attn_layer_norm": "attention_norm",
    "encoder_attn_layer_norm": "cross_norm",
    "final_layer_norm": "mlp_norm",
    "self_attn.out_proj": "attention.out",
    "encoder_attn.out_proj": "cross.out",
    "fc2": "mlp.down",
}
"""Modules of a checkpoint's layer that map to one module each."""
PARTS: Mapping[str, tuple[str, str]] = {
    **{f"self_attn.{part}_proj": ("attention.qkv", part) for part in ("q", "k", "v")},
    "encoder_attn.q_proj": ("cross.qkv.q", "q"),
    **{f"encoder_attn.{part}_proj": ("cross.qkv.kv", part) for part in ("k", "v")},
    "fc1": ("mlp.up", "up"),
}
"""Modules of a checkpoint's layer that are part of a fused projection, with that projection and part."""


def layer_rules(source: str, target: str, layers: int, biases: Sequence[str], *, cross: bool) -> list[Rule]:
    """Return the weight rules of the layers of a stack.

    Args:
        source: prefix of the tensors, up to the layer's index.
        target: path of the modules, up to the layer's index.
        layers: number of layers.
        biases: those of "q", "k" and "v" that have a bias.
        cross: whether the layers have cross-attention.
    """
    table = []
    for hf_name, (own_name, *parts) in {**{name: (path,) for name, path in NAMES.items()}, **PARTS}.items():
        if cross or not hf_name.startswith("encoder_attn"):
            rules = both(f"{source}.{{i}}.{hf_name}", f"{target}.{{i}}.{own_name}", tuple(parts))
            has_bias = "attn." not in hf_name or not parts or parts[0] in biases
            table += rules if has_bias else rules[:1]
    return expand(table, layers)


def both(source: str, target: str, parts: tuple[str, ...] = ()) -> list[Rule]:
    """Return the rules of weight and bias of a projection or norm; the weight of a norm is named "scale"."""
    weight = "scale" if target.endswith("norm") else "weight"
    return [Rule(f"{source}.weight", f"{target}.{weight}", parts), Rule(f"{source}.bias", f"{target}.bias", parts)]
