"""Qwen3-VL's config.json."""

import math
from dataclasses import dataclass, replace

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.errors import ConfigError
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.rope import frequency_axes
from jaxinfer.media.inputs import Features, Joint
from jaxinfer.models import qwen3, qwen3_moe
from jaxinfer.models.base import CrossSource
from jaxinfer.models.decoder_config import CompositeConfig, DecoderConfig
from jaxinfer.models.internvl.config import side

TAPS = [8, 16, 24]
"""Default of `deepstack_visual_indexes`."""
SECTIONS = [24, 20, 20]
"""Default of `mrope_section`."""
THETA = 10_000.0
"""Default base of the tower's rope."""
TEXT_SIZES = dict(vocab_size=151_936, hidden_size=4096, intermediate_size=22_016, num_hidden_layers=32)
MOE_TEXT_SIZES = dict(vocab_size=151_936, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24)
"""Default sizes of the configuration classes of the language models in transformers."""


@dataclass(frozen=True)
class TowerConfig:
    """Configuration of the vision tower."""

    width: int
    """M of the tower."""
    layers: int
    heads: int
    """H; divides the width."""
    ffn: int
    """F."""
    activation: str
    channels: int
    """C."""
    patch: int
    """Side of a patch in pixels."""
    frames: int
    """Frames of a video in a patch; an image is repeated."""
    merge: int
    """Side of the blocks of patches that become one row."""
    grid: int
    """Side of the grid of learned positions."""
    theta: float
    """Base of the rope of rows and columns."""
    taps: tuple[int, ...]
    """Layers whose outputs also become rows, which the first decoder layers get (DeepStack)."""
    out: int
    """M of the language model."""

    @property
    def head_dim(self) -> int:
        """D."""
        return self.width // self.heads

    @property
    def merged(self) -> int:
        """Number of patches that become one row."""
        return self.merge**2


@dataclass(frozen=True)
class Qwen3VLConfig(CompositeConfig):
    """Configuration of vision tower and language model."""

    vision: TowerConfig
    text: DecoderConfig
    image_token: int
    cross: CrossSource | None = None
    """Encoder inputs for cross-attention; None here."""

    @property
    def features(self) -> Features:
        """Images, a value for each token that they become."""
        vision = self.vision
        width = (1 + len(vision.taps)) * vision.out
        shape = (vision.merged, vision.channels, vision.patch, vision.patch)
        joint = Joint(positions=vision.merged, width=width, head_dim=vision.head_dim)
        return Features("image", shape, 1, self.image_token, joint, rope_axes=3)


def read_config(reader: ConfigReader, *, experts: bool = False) -> Qwen3VLConfig:
    """Read the configuration; `experts`: of the model with experts in place of MLPs.

    Raises:
        ConfigError: sizes do not fit each other, or an option is not supported.
    """
    text = _text(reader, experts=experts)
    vision = _vision(reader.part("vision_config"))
    if vision.out != text.attention.width:
        raise ConfigError(
            f"config.json: vision_config.out_hidden_size is {vision.out}, but text_config.hidden_size is "
            f"{text.attention.width}; they must be equal"
        )
    token = reader.get_int("image_token_id", 151_655, least=0)
    if token >= text.vocab_size:
        raise ConfigError(
            f"config.json: image_token_id is {token}, but vocab_size is {text.vocab_size}; it must be smaller"
        )
    reader.skip("video_token_id", "vision_start_token_id", "vision_end_token_id")
    return Qwen3VLConfig(vision, text, token)


def _text(reader: ConfigReader, *, experts: bool) -> DecoderConfig:
    """Read the language model, which is Qwen3 with M-RoPE."""
    # The whole model's setting is the one that counts, and false by default.
    tied = reader.get_bool("tie_word_embeddings", False)
    part = reader.part("text_config", tie_word_embeddings=tied)
    part.default_theta = 500_000.0
    part.defaults(max_position_embeddings=128_000, **(MOE_TEXT_SIZES if experts else TEXT_SIZES))
    if experts:
        part.defaults(num_attention_heads=16, num_local_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408)
        part.defaults_if_absent(num_key_value_heads=16)
        part.replace(norm_topk_prob=True)  # transformers' router always renormalises
        text = qwen3_moe.config(part)
    else:
        part.defaults(num_attention_heads=32)
        text = qwen3.config(part)
    return replace(text, rope=replace(text.rope, sections=_sections(part, text)))


def _sections(part: ConfigReader, text: DecoderConfig) -> tuple[int, ...]:
    """Read how many frequencies time, rows and columns turn, and refuse ropes that M-RoPE is not defined for."""
    stated = part.config.get("rope_scaling") or part.config.get("rope_parameters") or {}
    found, woven = stated.get("mrope_section", SECTIONS), stated.get("mrope_interleaved", True)
    if woven is not True:
        raise ConfigError(f"{part.family}: mrope_interleaved is {show(woven)}; only true is supported")
    if text.rope.depends_on_length:
        raise ConfigError(f"{part.family}: rope type {text.rope.kind!r} is not supported with images; use 'yarn'")
    numbers = isinstance(found, list) and len(found) == 3 and all(type(one) is int and one >= 0 for one in found)
    half = text.rope.rotary_dim // 2
    if not numbers or sum(found) != half or len(frequency_axes(half, found).nonzero()[0]) != sum(found[1:]):
        raise ConfigError(
            f"{part.family}: mrope_section is {show(found)}; it must be three whole numbers that sum to half of "
            f"head_dim, {half}, of which the last two are at most a third"
        )
    return tuple(found)


def _vision(reader: ConfigReader) -> TowerConfig:
    reader.skip("tie_word_embeddings")  # written by a full dump; the tower has no head
    width, heads = reader.get_int("hidden_size", 1152), reader.get_int("num_heads", 16)
    head_dim = reader.divide("hidden_size", width, "num_heads", heads)
    if head_dim % 4:
        raise ConfigError(
            f"{reader.family}: hidden_size / num_heads is {head_dim}; it must be a multiple of 4, as half of a head's "
            "columns rotate by the patch's row and half by its column"
        )
    reader.defaults(patch_size=16)
    layers, learned = reader.get_int("depth", 27), reader.get_int("num_position_embeddings", 2304)
    if math.isqrt(learned) ** 2 != learned:
        raise ConfigError(
            f"{reader.family}: num_position_embeddings is {learned}; it must be a square number, the positions of a "
            "square grid"
        )
    taps = reader.get_list("deepstack_visual_indexes", TAPS)
    if any(type(tap) is not int or not 0 <= tap < layers for tap in taps) or taps != sorted(set(taps)):
        raise ConfigError(
            f"{reader.family}: deepstack_visual_indexes is {show(taps)}; it must be ascending layers from 0 to "
            f"{layers - 1}"
        )
    return TowerConfig(
        width=width,
        layers=layers,
        heads=heads,
        ffn=reader.get_int("intermediate_size", 4304),
        activation=reader.get_choice("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS),
        channels=reader.get_int("in_channels", 3),
        patch=side(reader, "patch_size"),
        frames=reader.get_int("temporal_patch_size", 2),
        merge=reader.get_int("spatial_merge_size", 2),
        grid=math.isqrt(learned),
        theta=_theta(reader),
        taps=tuple(taps),
        out=reader.get_int("out_hidden_size", 3584),
    )


def _theta(reader: ConfigReader) -> float:
    """Read the base of the tower's rope, which rotates by row and column."""
    stated = reader.get("rope_parameters", None) or {}
    kind = stated.get("rope_type", "axial") if isinstance(stated, dict) else None
    theta = stated.get("rope_theta", THETA) if isinstance(stated, dict) else None
    known = isinstance(stated, dict) and set(stated) <= {"rope_type", "rope_theta"}
    if not known or kind not in ("axial", "default") or type(theta) not in (int, float) or not 1 < theta < 1e30:
        raise ConfigError(
            f"{reader.family}: rope_parameters is {show(stated)}; the tower's rope has rope_type 'axial' and a "
            "rope_theta above 1"
        )
    return float(theta)
