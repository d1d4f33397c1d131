"""Granite 3 (`GraniteForCausalLM`): Llama with multipliers of embeddings, scores, residuals and logits
(arXiv:2408.13359)."""

from dataclasses import dataclass, fields, replace
from functools import partial

import jax

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.layers.norms import scale_by
from jaxinfer.layers.params import Build
from jaxinfer.models import llama
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, Layer, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig


@dataclass(frozen=True)
class GraniteConfig(DecoderConfig):
    """A Llama decoder whose blocks scale what they add."""

    residual_multiplier: float = 1.0
    """Multiplies what attention and the MLP add to the residual."""


class GraniteLayer(Layer):
    """Run a Llama block with scaled residuals."""

    def __init__(self, build: Build, config: GraniteConfig, number: int):
        super().__init__(build, config, number)
        self.residual_multiplier = config.residual_multiplier

    def add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Add `y` times the residual multiplier; both `[T, M]`."""
        return x + scale_by(y, self.residual_multiplier)


def config(reader: ConfigReader) -> GraniteConfig:
    """Read the four multipliers and what Granite shares with Llama."""
    shared = llama.config(reader)
    shared = replace(
        shared,
        attention=replace(shared.attention, scale=reader.get_float("attention_multiplier", 1.0)),
        embedding_scale=reader.get_float("embedding_multiplier", 1.0),
        round_embedding_scale=False,
        logit_scale=1.0 / reader.get_float("logits_scaling", 1.0, above=0),
    )
    values = {field.name: getattr(shared, field.name) for field in fields(shared)}
    return GraniteConfig(**values, residual_multiplier=reader.get_float("residual_multiplier", 1.0))


FAMILY = Family(config, partial(Decoder, block=GraniteLayer), partial(weight_rules, block=GraniteLayer))
