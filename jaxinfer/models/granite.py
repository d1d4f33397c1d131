"""Granite 3 (`GraniteForCausalLM`, arXiv:2408.13359): Llama with multipliers.

They scale embeddings, attention scores, residuals and logits.
"""

from dataclasses import dataclass, fields, replace
from functools import partial

import jax

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.layers.norms import scale_by
from jaxinfer.layers.params import Build
from jaxinfer.models import llama
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, Layer, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig


@dataclass(frozen=True)
class GraniteConfig(DecoderConfig):
    """Llama decoder with scaled residual branches."""

    residual_multiplier: float = 1.0
    """Factor on the outputs of attention and the MLP before they are added to the residual."""


class GraniteLayer(Layer):
    """Llama layer with scaled residual branches."""

    def __init__(self, build: Build, config: GraniteConfig, number: int):
        super().__init__(build, config, number)
        self.residual_multiplier = config.residual_multiplier

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Add `y` times the residual multiplier to `x`; both `[T, M]`."""
        return x + scale_by(y, self.residual_multiplier)


def config(reader: ConfigReader) -> GraniteConfig:
    """Read the configuration: Llama's attributes and the four multipliers."""
    return multiplied(reader, llama.config(reader))


def multiplied(reader: ConfigReader, shared: DecoderConfig) -> GraniteConfig:
    """Return a configuration with the four multipliers of config.json."""
    shared = replace(
        shared,
        attention=replace(shared.attention, scale=reader.get_float("attention_multiplier", 1.0)),
        embedding_scale=reader.get_float("embedding_multiplier", 1.0),
        round_embedding_scale=False,
        logit_scale=1.0 / reader.get_float("logits_scaling", 1.0, above=0),
    )
    values = {field.name: getattr(shared, field.name) for field in fields(shared)}
    return GraniteConfig(**values, residual_multiplier=reader.get_float("residual_multiplier", 1.0))


FAMILY = Family(
    {"GraniteForCausalLM": "granite"},
    config,
    partial(Decoder, block=GraniteLayer),
    partial(weight_rules, block=GraniteLayer),
)
