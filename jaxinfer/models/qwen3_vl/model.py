"""Qwen3-VL (`Qwen3VLForConditionalGeneration`, arXiv:2511.21631): a vision tower for images of any size, and Qwen3.

Rows of the tower replace the embeddings of image tokens, and rows of some of its layers are added to the outputs of the
first decoder layers (DeepStack). Rope turns by three positions a token (`media.rope_positions`). With quantised weights
the tower stays in the model's dtype. Videos are not read.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
from flax import nnx

from jaxinfer.checkpoint.weight_table import Rule, renamed
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kv.spec import Spec
from jaxinfer.layers.attention import StepContext
from jaxinfer.layers.encoder import EncodeStep
from jaxinfer.layers.params import Build
from jaxinfer.models.base import Family, FeatureRows
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.decoder import weight_rules as decoder_rules
from jaxinfer.models.qwen3_vl import vision
from jaxinfer.models.qwen3_vl.config import Qwen3VLConfig, read_config
from jaxinfer.models.qwen3_vl.images import IMAGES


class Qwen3VL(nnx.Module):
    """Qwen3-VL: vision tower and decoder."""

    def __init__(self, build: Build, config: Qwen3VLConfig):
        self.config, self.mesh = config, build.mesh
        self.visual = vision.Tower(build._replace(quantization=None).at("visual"), config.vision)
        self.language_model = Decoder(build.at("language_model"), config.text)

    def encode_joint(self, inputs: jax.Array, numbers: jax.Array, step: EncodeStep) -> jax.Array:
        """Encode values `[U, merged, C, P, P]` of images with their places `[U, 4]` to rows `[U, 1, width]`."""
        return self.visual(inputs, numbers, step)[:, None]

    def __call__(
        self, tokens: jax.Array, step: StepContext, cache: Cache, features: FeatureRows | None = None
    ) -> tuple[jax.Array, Cache]:
        """Compute hidden states `[T, M]` after the final norm for token ids `[T]`; also return the new cache arrays."""
        return self.language_model(tokens, step, cache, features)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute float32 logits `[B, V']` of hidden states `[B, M]`."""
        return self.language_model.logits(hidden)

    def cache_specs(self) -> Sequence[Spec]:
        """Return what each layer of the language model caches; the tower caches nothing."""
        return self.language_model.cache_specs()


def weight_rules(config: Qwen3VLConfig) -> list[Rule]:
    """Return the weight rules of all tensors, by their names on the Hub and in transformers."""
    table = [
        replace(rule, source=f"model.visual.{rule.source}", target=f"visual.{rule.target}")
        for rule in vision.weight_rules(config.vision)
    ]
    for rule in renamed(decoder_rules(config.text), {"model.": "model.language_model."}):  # the head is outside
        instead = tuple(replace(one, target=f"language_model.{one.target}") for one in rule.instead)
        table.append(replace(rule, target=rule.target and f"language_model.{rule.target}", instead=instead))
    return table


def untie(config: Qwen3VLConfig, tie: str) -> Qwen3VLConfig:
    """Return the configuration with an untied head."""
    return replace(config, text=replace(config.text, tied=False))


FAMILY = Family(
    {"Qwen3VLForConditionalGeneration": "qwen3_vl"}, read_config, Qwen3VL, weight_rules, images=IMAGES, untie=untie
)
