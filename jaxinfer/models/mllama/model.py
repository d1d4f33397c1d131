"""Llama 3.2 Vision (`MllamaForConditionalGeneration`, arXiv:2407.21783): a Llama with cross-attention layers to images.

Those layers are gated and have no self-attention. A token sees the images of the last run of image tokens at or before
it (`models.mllama.prompt`). Tokens that see no image pass these layers unchanged, as in the original, so that a prompt
without images runs through a plain Llama; transformers skips only the MLP for them (its issue 39379).
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.kernels.attention.paged import KVCache
from jaxinfer.kv.spec import Full
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.cross import CrossAttention, CrossSpec
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.encoder import EncodeStep
from jaxinfer.layers.linear import RowLinear
from jaxinfer.layers.mlp import GatedMLP
from jaxinfer.layers.norms import RMSNorm
from jaxinfer.layers.params import Build, constant
from jaxinfer.layers.rope import cos_sin
from jaxinfer.models.base import Family, FeatureRows
from jaxinfer.models.decoder import Layer
from jaxinfer.models.decoder import weight_rules as decoder_rules
from jaxinfer.models.decoder_config import DecoderConfig
from jaxinfer.models.encoder_decoder import keep_cross
from jaxinfer.models.mllama import vision
from jaxinfer.models.mllama.config import EXTRA_TOKENS, MllamaConfig, read_config
from jaxinfer.models.mllama.prompt import IMAGES, MllamaReader
from jaxinfer.models.mllama.vision import MllamaVision
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ENCODE


class Projector(nnx.Module):
    """Projector from tower rows to the decoder's width."""

    no_split = True
    steps = (ENCODE,)

    def __init__(self, build: Build, width: int, out: int):
        self.linear = RowLinear(build, axes.FFN, width, out, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Project `[n, t, p, width]` to `[S, M]`."""
        return self.linear(x.reshape(-1, self.linear.tp, x.shape[-1] // self.linear.tp))


class CrossLayer(nnx.Module):
    """Cross-attention layer, gated and skipped by tokens that see no image.

    `x + tanh(a) * attention(norm(x))`, then `x + tanh(b) * mlp(norm(x))`.
    """

    def __init__(self, build: Build, config: DecoderConfig):
        own, width = config.attention, config.attention.width
        spec = CrossSpec(width, own.heads, own.kv_heads, own.head_dim, norm_eps=config.norm_eps)
        self.attention_norm = RMSNorm(build.at("attention_norm"), width, config.norm_eps, axes.EMBED)
        self.attention = CrossAttention(build.at("attention"), spec)
        self.mlp_norm = RMSNorm(build.at("mlp_norm"), width, config.norm_eps, axes.EMBED)
        self.mlp = GatedMLP(build.at("mlp"), width, config.ffn, config.activation)
        self.attention_gate = constant(build, (1,), (None,), 0.0)
        self.mlp_gate = constant(build, (1,), (None,), 0.0)

    def __call__(
        self, x: jax.Array, kv_cache: KVCache, rope: tuple[jax.Array, jax.Array], step: StepContext
    ) -> tuple[jax.Array, KVCache]:
        """Map hidden states `[T, M]` to `[T, M]`; also return the layer's new cache."""
        y, kv_cache = self.attention(self.attention_norm(x), kv_cache, step)
        x = x + jnp.tanh(self.attention_gate[...]) * y
        sees = (step.seen[:, 1] > step.seen[:, 0])[:, None]
        y = jnp.where(sees, self.mlp(self.mlp_norm(x)), 0)
        return x + jnp.tanh(self.mlp_gate[...]) * y, kv_cache


class MllamaText(nnx.Module):
    """Decoder with self- and cross-attention layers; its embedding has more rows than the head."""

    def __init__(self, build: Build, config: MllamaConfig):
        text, width = config.text, config.text.attention.width
        self.config = config
        lookup = build._replace(quantization=None)  # a table used for lookups only gains nothing from int8
        self.embedding = Embedding(lookup.at("embedding"), text.vocab_size + EXTRA_TOKENS, width)
        self.layers = nnx.List(
            [
                CrossLayer(build.at("layers", i), text)
                if i in config.cross_layers
                else Layer(build.at("layers", i), text, i)
                for i in range(text.num_layers)
            ]
        )
        self.norm = RMSNorm(build.at("norm"), width, text.norm_eps, axes.EMBED)
        self.head = Embedding(build.at("head"), text.vocab_size, width, lookup=False, head=True)

    def __call__(self, tokens: jax.Array, step: StepContext, cache: list[KVCache]) -> tuple[jax.Array, list[KVCache]]:
        """Compute hidden states `[T, M]` after the final norm for token ids `[T]`; also return the new cache arrays."""
        x, cache = self.embedding(tokens), list(cache)
        rope = cos_sin(self.config.text.rope, step.positions, step.rope_lengths)
        for number, layer in enumerate(self.layers):
            index = step.array_index(number)
            x, cache[index] = layer(x, cache[index], rope, step.of(number))
        return self.norm(x), cache


class Mllama(nnx.Module):
    """Llama 3.2 Vision: vision tower, projector, decoder."""

    def __init__(self, build: Build, config: MllamaConfig):
        self.config, self.mesh = config, build.mesh
        unquantised = build._replace(quantization=None)
        self.vision_model = MllamaVision(unquantised.at("vision_model"), config.vision)
        self.projector = Projector(unquantised.at("projector"), config.vision.width, config.text.attention.width)
        self.language_model = MllamaText(build.at("language_model"), config)

    def encode_cross(
        self, inputs: jax.Array, numbers: jax.Array, step: EncodeStep, cache: list[KVCache]
    ) -> list[KVCache]:
        """Encode images `[U, t, C, height, width]` with canvas ids `[U, 1]` into the cache's keys and values."""
        encoded = self.projector(self.vision_model(inputs, numbers[:, 0]))
        layers = self.language_model.layers
        parts = ((number, layers[number].attention) for number in sorted(self.config.cross_layers))
        return keep_cross(parts, encoded, cache, step)

    def __call__(
        self, tokens: jax.Array, step: StepContext, cache: list[KVCache], features: FeatureRows | None = None
    ) -> tuple[jax.Array, list[KVCache]]:
        """Compute hidden states `[T, M]` after the final norm for token ids `[T]`; also return the new cache arrays."""
        return self.language_model(tokens, step, cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute float32 logits `[B, V']` of hidden states `[B, M]`."""
        return self.language_model.head.logits(hidden)

    def cache_specs(self) -> Sequence[Full]:
        """Return what each layer caches."""
        return [layer.attention.cache_spec for layer in self.language_model.layers]


def weight_rules(config: MllamaConfig) -> list[Rule]:
    """Return the weight rules of all tensors, by their names on the Hub and in transformers."""
    table = [
        replace(rule, source=f"vision_model.{rule.source}", target=f"vision_model.{rule.target}")
        for rule in vision.weight_rules(config.vision)
    ]
    table += [Rule(f"multi_modal_projector.{leaf}", f"projector.linear.{leaf}") for leaf in ("weight", "bias")]
    table = [replace(rule, also=(f"model.{rule.source}",)) for rule in table]
    for rule in [*_plain_rules(config), *_cross_rules(config)]:
        own = rule.source.replace("model.", "model.language_model.", 1)  # the head is outside of `model`
        source = f"language_model.{rule.source}"
        table.append(replace(rule, source=source, target=f"language_model.{rule.target}", also=(own,)))
    return table


def _plain_rules(config: MllamaConfig) -> list[Rule]:
    """Return the rules of a Llama, without self-attention of the cross layers."""
    without = tuple(f"layers.{i}.attention." for i in config.cross_layers)
    return [rule for rule in decoder_rules(config.text) if not rule.target.startswith(without)]


def _cross_rules(config: MllamaConfig) -> list[Rule]:
    made = []
    for i in sorted(config.cross_layers):
        source, target = f"model.layers.{i}", f"layers.{i}"
        for part, projection in {"q": "q", "k": "kv", "v": "kv"}.items():
            made.append(
                Rule(f"{source}.cross_attn.{part}_proj.weight", f"{target}.attention.qkv.{projection}.weight", (part,))
            )
        made.append(Rule(f"{source}.cross_attn.o_proj.weight", f"{target}.attention.out.weight"))
        for part in ("q", "k"):
            made.append(Rule(f"{source}.cross_attn.{part}_norm.weight", f"{target}.attention.{part}_norm.scale"))
        made.append(Rule(f"{source}.cross_attn_attn_gate", f"{target}.attention_gate"))
        made.append(Rule(f"{source}.cross_attn_mlp_gate", f"{target}.mlp_gate"))
    return made


FAMILY = Family(
    {"MllamaForConditionalGeneration": "mllama"}, read_config, Mllama, weight_rules, images=IMAGES, reader=MllamaReader
)
