"""BART (arXiv:1910.13461) and mBART (arXiv:2001.08210): a text encoder, and a decoder that attends to it.

They differ in their norms: BART's are post-norms, mBART's are pre-norms with an additional one after the last layer of
both encoder and decoder.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.kernels.attention.paged import KVCache
from jaxinfer.kv.spec import Full
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.embedding import Embedding, LearnedPositions
from jaxinfer.layers.encoder import EncodeStep
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.params import Build, constant
from jaxinfer.models.base import CrossSource, Family, FeatureRows
from jaxinfer.models.encoder_decoder import (
    DecoderLayer,
    EncoderLayer,
    StackConfig,
    both,
    cache_specs,
    cross_parts,
    decode,
    keep_cross,
    layer_rules,
    norm,
    read_stack,
)
from jaxinfer.sharding import axes
from jaxinfer.sharding.collectives import ENCODE, STEPS

OFFSET = 2
"""Index of position 0 in the tables of learned positions."""
HALVES = ("encoder", "decoder")
HEAD = "head"
TABLES = (*HALVES, HEAD)
"""Users of the token embedding: each shares it or has one of its own."""


@dataclass(frozen=True)
class BartConfig:
    """Shape and options of encoder and decoder."""

    vocab_size: int
    """V: vocabulary size."""
    width: int
    """M: width of encoder and decoder."""
    encoder: StackConfig
    decoder: StackConfig
    activation: str
    embedding_scale: float
    """Factor on token embeddings."""
    norm_first: bool
    """Whether layers are pre-norm (mBART)."""
    own: frozenset[str] = frozenset()
    """Members of `TABLES` that do not share the token embedding."""
    features: None = None
    """Encoder inputs that replace token embeddings: none."""
    recompute_after: None = None
    """Length beyond which rope changes; None, as positions are learned."""
    query_group: int = 1
    """Number of query heads per kv head."""
    biases: tuple[str, ...] = ("q", "k", "v")
    """Projections with a bias."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.decoder.layers

    @property
    def cross(self) -> CrossSource:
        """Encoder inputs: texts of up to the encoder's number of positions, whose tokens are encoded together."""
        return CrossSource("text", (), 1, self.encoder.positions, joint=True)

    @property
    def max_length(self) -> int:
        """Maximum length of a decoder sequence."""
        return self.decoder.positions

    def length_key(self, prompt_length: int) -> bytes:
        """Return an empty salt: keys do not depend on the prompt's length."""
        return b""


def read_config(reader: ConfigReader, *, norm_first: bool) -> BartConfig:
    """Read the configuration of BART or mBART.

    Raises:
        ConfigError: sizes do not fit each other, or the activation is unknown.
    """
    width, activation = reader.get_int("d_model"), reader.get_choice("activation_function", "gelu", ACTIVATIONS)

    tied = reader.get_bool("tie_word_embeddings", True)
    # transformers no longer reads these, but the code that some checkpoints were published with did.
    one_value = {
        "normalize_before": norm_first,
        "add_final_layer_norm": norm_first,
        "normalize_embedding": True,
        "add_bias_logits": False,
        "static_position_embeddings": False,
        "extra_pos_embeddings": OFFSET,
        "do_blenderbot_90_layernorm": False,
    }
    for name, value in one_value.items():
        reader.require(name, value)
    # Attributes of training and of other tasks, and copies.
    reader.skip("num_hidden_layers", "force_bos_token_to_be_generated", "gradient_checkpointing")
    reader.defaults(max_position_embeddings=1024)
    scaled = reader.get_bool("scale_embedding", False)
    return BartConfig(
        vocab_size=reader.get_int("vocab_size"),
        width=width,
        encoder=read_stack(reader, "encoder", width, "max_position_embeddings"),
        decoder=read_stack(reader, "decoder", width, "max_position_embeddings"),
        activation=activation,
        embedding_scale=math.sqrt(width) if scaled else 1.0,
        norm_first=norm_first,
        own=frozenset() if tied else frozenset(TABLES),
    )


class Stack(nnx.Module):
    """Common parts of encoder and decoder: positions, a norm of the embedding, layers, and in mBART a final norm."""

    def __init__(self, build: Build, config: BartConfig, stack: StackConfig, layer: type[EncoderLayer | DecoderLayer]):
        self.positions = LearnedPositions(build.at("positions"), stack.positions, config.width, offset=OFFSET)
        self.embedding_norm = norm(build.at("embedding_norm"), config.width)
        self.layers = nnx.List([layer(build.at("layers", i), config, stack) for i in range(stack.layers)])
        self.norm = norm(build.at("norm"), config.width) if config.norm_first else None

    def enter(self, embedded: jax.Array, positions: jax.Array) -> jax.Array:
        """Add positions `[T]` to embeddings `[T, M]` and normalise: the input of the first layer."""
        return self.embedding_norm(embedded + self.positions(positions))

    def leave(self, x: jax.Array) -> jax.Array:
        """Apply the final norm, if there is one, to the output of the last layer."""
        return x if self.norm is None else self.norm(x)


def _embedding(build: Build, config: BartConfig, parts: Sequence[str]) -> Embedding:
    """Build the embedding shared by these members of `TABLES`."""
    lookup, head = parts != (HEAD,), HEAD in parts
    build = (
        build if head else build._replace(quantization=None)
    )  # a table used for lookups only gains nothing from int8
    made = Embedding(build, config.vocab_size, config.width, lookup=lookup, head=head)
    made.steps = tuple(dict.fromkeys(step for part in parts for step in ((ENCODE,) if part == "encoder" else STEPS)))
    return made


class Bart(nnx.Module):
    """BART encoder and decoder, which share one embedding with the head unless `BartConfig.own` says otherwise.

    `cache_specs` lists self-attentions first, then cross-attentions.
    """

    def __init__(self, build: Build, config: BartConfig):
        self.config = config
        shared = tuple(part for part in TABLES if part not in config.own)
        self.embedding = _embedding(build.at("embedding"), config, shared) if shared else None
        self.encoder_embedding, self.decoder_embedding, self.head = (
            _embedding(build.at(name), config, (part,)) if part in config.own else None
            for part, name in zip(TABLES, ("encoder_embedding", "decoder_embedding", "head"), strict=True)
        )
        self.encoder = Stack(build.at("encoder"), config, config.encoder, EncoderLayer)
        self.encoder.steps = (ENCODE,)
        self.decoder = Stack(build.at("decoder"), config, config.decoder, DecoderLayer)
        head = self.embedding if self.head is None else self.head
        names, whole = (None, axes.VOCAB), (1, config.vocab_size)
        at = build.at("embedding" if self.head is None else "head")
        self.logits_bias = constant(at, (1, head.weight.shape[0]), names, 0.0, unpadded=whole)

    def _embed(self, tokens: jax.Array, own: Embedding | None) -> jax.Array:
        return (self.embedding if own is None else own)(tokens) * self.config.embedding_scale

    def encode(self, tokens: jax.Array, step: EncodeStep) -> jax.Array:
        """Run the encoder over token ids `[S]`; returns `[S, M]`."""
        x = self.encoder.enter(self._embed(tokens, self.encoder_embedding), step.positions)
        for layer in self.encoder.layers:
            x = layer(x, step)
        return self.encoder.leave(x)

    def encode_cross(
        self, inputs: jax.Array, numbers: jax.Array, step: EncodeStep, cache: list[KVCache]
    ) -> list[KVCache]:
        """Encode token ids `[S]` and return the cache arrays with the keys and values of all cross-attentions."""
        return keep_cross(cross_parts(self.decoder.layers), self.encode(inputs, step), cache, step)

    def __call__(
        self, tokens: jax.Array, step: StepContext, cache: list[KVCache], features: FeatureRows | None = None
    ) -> tuple[jax.Array, list[KVCache]]:
        """Compute hidden states `[T, M]` after the last layer for token ids `[T]`; also return the new cache arrays."""
        x = self.decoder.enter(self._embed(tokens, self.decoder_embedding), step.positions)
        x, cache = decode(self.decoder.layers, x, cache, step)
        return self.decoder.leave(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute float32 logits `[B, V']` of hidden states `[B, M]`."""
        head = self.embedding if self.head is None else self.head
        return head.logits(hidden) + self.logits_bias[...].astype(jnp.float32)

    def cache_specs(self) -> Sequence[Full]:
        """Return what self-attentions cache, then what cross-attentions cache."""
        return cache_specs(self.decoder.layers)


def weight_rules(config: BartConfig) -> list[Rule]:
    """Return the weight rules of all tensors. Checkpoints store tied tensors under one name or several."""
    table = [
        Rule("model.shared.weight", None if config.own == frozenset(TABLES) else "embedding.weight"),
        Rule("final_logits_bias", "logits_bias", optional=True),
    ]
    names = (*(f"model.{half}.embed_tokens.weight" for half in HALVES), "lm_head.weight")
    for part, name, path in zip(TABLES, names, ("encoder_embedding", "decoder_embedding", "head"), strict=True):
        own = part in config.own
        table.append(Rule(name, f"{path}.weight") if own else Rule(name, "embedding.weight", tied=part))
    for half, stack in zip(HALVES, (config.encoder, config.decoder), strict=True):
        own = [Rule(f"model.{half}.embed_positions.weight", f"{half}.positions.weight")]
        own += both(f"model.{half}.layernorm_embedding", f"{half}.embedding_norm")
        own += both(f"model.{half}.layer_norm", f"{half}.norm") if config.norm_first else []
        prefix = f"model.{half}.layers", f"{half}.layers"
        table += [*own, *layer_rules(*prefix, stack.layers, config.biases, cross=half == "decoder")]
    return table


def untie(config: BartConfig, tie: str) -> BartConfig:
    """Return the configuration with an embedding of its own for one of `TABLES`."""
    return replace(config, own=config.own | {tie})


FAMILY = Family(
    {"BartForConditionalGeneration": "bart"}, partial(read_config, norm_first=False), Bart, weight_rules, untie=untie
)
