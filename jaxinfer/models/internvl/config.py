"""InternVL's config.json, of transformers' checkpoints and of original ones (whose code is never executed)."""

from dataclasses import dataclass
from typing import Any

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.checkpoint.size_limits import int_if_whole
from jaxinfer.errors import ConfigError
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.vision import NORMS, VisionConfig
from jaxinfer.media.inputs import Features
from jaxinfer.models import registry
from jaxinfer.models.base import CrossSource
from jaxinfer.models.decoder_config import CompositeConfig, DecoderConfig

LANGUAGE_MODELS = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
"""`model_type` -> architecture of the supported language models."""

_QWEN = dict(
    vocab_size=151_936, hidden_size=4096, intermediate_size=22_016, num_hidden_layers=32, num_attention_heads=32
)
TEXT_SIZES = {
    "Qwen2ForCausalLM": _QWEN,
    "Qwen3ForCausalLM": _QWEN,
    "LlamaForCausalLM": _QWEN | dict(vocab_size=32_000, intermediate_size=11_008),
}
"""Default sizes of the language models' configuration classes in transformers."""
VISION_SIZES = dict(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    image_size=[448, 448],
    patch_size=[14, 14],
)
"""Default sizes of the vision tower's configuration class in transformers."""

MAX_SIDE = 2**13
"""Maximum side of an image, a tile or a patch in pixels; far above any real model."""

CHAT_ONLY = (
    "template",
    "system_message",
    "use_backbone_lora",
    "use_llm_lora",
    "use_thumbnail",
    "dynamic_image_size",
    "pad2square",
    "min_dynamic_patch",
    "max_dynamic_patch",
    "image_fold",
    "hidden_size",
)
"""Attributes of original files about prompts and tiles (read by `internvl.images`), and copies of sizes."""

TRAINING_ONLY = (
    "capacity_factor",
    "eval_capacity_factor",
    "laux_allreduce",
    "moe_coeff_ratio",
    "moe_intermediate_size",
    "moe_output_scale",
    "noisy_gate_policy",
    "num_experts",
    "num_routed_experts",
    "num_shared_experts",
    "shared_expert_intermediate_size",
    "use_residual",
    "use_rts",
    "use_weighted_residual",
)
"""Attributes of original vision configs about training, and about the experts that `use_moe` would enable."""


@dataclass(frozen=True)
class InternVLConfig(CompositeConfig):
    """Configuration of vision tower, projector and language model."""

    vision: VisionConfig
    text: DecoderConfig
    image_size: int
    """Side of a tile in pixels."""
    image_token: int
    """Id of the image token; -1 if unknown."""
    shuffle: int
    """Side of the blocks of patches that are merged into one row."""
    transposed: bool
    """Whether rows run down the columns of a tile (`ps_version` "v1" of original checkpoints)."""
    activation: str
    """Activation of the projector."""
    stored_layers: int
    """Number of tower layers in the checkpoint; those from `vision.layers` on are unused."""
    original: bool
    """Whether tensors have the names of original checkpoints."""
    cross: CrossSource | None = None
    """Encoder inputs for cross-attention; None here."""

    @property
    def features(self) -> Features:
        """Tiles of images, whose rows replace image tokens."""
        side = self.image_size // self.vision.patch_size // self.shuffle
        return Features("image", (self.vision.channels, self.image_size, self.image_size), side**2, self.image_token)


def read_config(reader: ConfigReader) -> InternVLConfig:
    """Read the config.json of either kind of checkpoint.

    Raises:
        ConfigError: sizes do not fit each other, or a part or option is not supported.
    """
    original = reader.has("llm_config")
    text = _language_model(reader, "llm_config" if original else "text_config")
    part = reader.part("vision_config")
    part.skip("tie_word_embeddings")  # written by a full dump; the tower has no head
    if not original:
        part.defaults(**VISION_SIZES)
    shuffle = _shuffle(reader.get_float("downsample_ratio", 0.5))
    if original:
        vision, total = _vision(part, reader.get("select_layer", -1), "qkv_bias", "qk_normalization", original=True)
        transposed = reader.get_choice("ps_version", "v1", ("v1", "v2")) == "v1"
        size, token, activation = reader.get_int("force_image_size", vision.image_size), -1, "gelu"
        reader.skip(*CHAT_ONLY)
        part.skip(*TRAINING_ONLY)
        part.require("use_moe", False)
    else:
        layer = reader.get("vision_feature_layer", -1)
        vision, total = _vision(part, layer, "attention_bias", "use_qk_norm", original=False)
        reader.get_choice("vision_feature_select_strategy", "default", ("default",))
        size, token, transposed = _tile(vision, shuffle, reader.get_int("image_seq_length", 256)), 151667, False
        activation = reader.get_choice("projector_hidden_act", "gelu", ACTIVATIONS)
        part.skip("layer_scale_init_value", "projection_dropout", "use_mask_token")  # the mask token is for training
    token = reader.get_int("image_token_id", token, least=0)
    if token >= text.vocab_size:
        raise ConfigError(
            f"config.json: image_token_id is {token}, but vocab_size is {text.vocab_size}; it must be smaller"
        )
    if size % (vision.patch_size * shuffle) or size > MAX_SIDE:
        raise ConfigError(
            f"config.json: a tile is {size} pixels a side (force_image_size, image_seq_length); it must be a multiple "
            f"of patch_size / downsample_ratio = {vision.patch_size * shuffle}, up to {MAX_SIDE}"
        )
    return InternVLConfig(vision, text, size, token, shuffle, transposed, activation, total, original)


def _language_model(reader: ConfigReader, name: str) -> DecoderConfig:
    """Read the language model's configuration with its own family's reader.

    Files written by transformers omit values that equal the defaults of the language model's configuration class.
    """
    tied = reader.get_bool("tie_word_embeddings", None)  # the whole model's overrides the part's
    part = reader.part(name, **({} if tied is None else {"tie_word_embeddings": tied}))
    if name == "text_config":
        part.defaults(tie_word_embeddings=True)  # default of transformers' class of the whole model
    listed, kind = part.get("architectures", []), part.get_str("model_type", "qwen2")
    named = listed[0] if isinstance(listed, list) and listed else LANGUAGE_MODELS.get(kind)
    if named not in LANGUAGE_MODELS.values():
        raise ConfigError(
            f"config.json: {name} has architectures {show(listed)} and model_type {kind!r}, which is not supported "
            f"as the language model of {reader.family}; supported: {', '.join(LANGUAGE_MODELS.values())}"
        )
    part.skip("architectures", "model_type")
    part.defaults(**(TEXT_SIZES[named] if name == "text_config" else {}))
    return registry.family({"architectures": [named]}).read_config(part)


def _vision(
    reader: ConfigReader, layer: Any, qkv_bias: str, qk_norm: str, *, original: bool
) -> tuple[VisionConfig, int]:
    """Return the tower's configuration up to the layer that is read, and the number of layers in the checkpoint."""
    width, heads = reader.get_int("hidden_size"), reader.get_int("num_attention_heads")
    image, patch = side(reader, "image_size"), side(reader, "patch_size")
    reader.divide("hidden_size", width, "num_attention_heads", heads)
    reader.divide("image_size", image, "patch_size", patch)
    eps, stored = reader.get_float("layer_norm_eps", 1e-6, above=0), reader.get_int("num_hidden_layers")
    normed = reader.get_bool(qk_norm, original)
    pooled = original or reader.get_bool("use_mean_pooling", True)
    return VisionConfig(
        width=width,
        layers=_computed(layer, stored),
        heads=heads,
        ffn=reader.get_int("intermediate_size"),
        activation=reader.get_choice("hidden_act", "gelu", ACTIVATIONS),
        channels=reader.get_int("num_channels", 3),
        image_size=image,
        patch_size=patch,
        norm=reader.get_choice("norm_type", "rms_norm" if original else "layer_norm", NORMS),
        norm_eps=eps,
        qkv_bias=reader.get_bool(qkv_bias, False),
        # transformers uses a separate epsilon for q and k norms.
        qk_norm_eps=(eps if original else 1e-6) if normed else None,
        positions=original or reader.get_bool("use_absolute_position_embeddings", True),
        final_norm=not pooled and layer == -1,
    ), stored


def _computed(layer: Any, stored: int) -> int:
    """Return how many layers run to compute output `layer`: -1 is the last layer's, 0 the input of the first."""
    if not isinstance(layer, int) or isinstance(layer, bool) or not -stored - 1 <= layer <= stored:
        raise ConfigError(
            f"config.json: vision_feature_layer (or select_layer) is {show(layer)}; it must be an integer from "
            f"{-stored - 1} to {stored}, as the tower has {stored} layers"
        )
    return layer + stored + 1 if layer < 0 else layer


def _shuffle(ratio: float) -> int:
    """Return the side of the blocks of patches that are merged into one row."""
    whole = round(1 / ratio) if 2**-10 <= ratio <= 1 else 0
    if whole * ratio != 1:
        raise ConfigError(f"config.json: downsample_ratio is {ratio}; it must be 1 over a power of two up to 1024")
    return whole


def side(reader: ConfigReader, name: str) -> int:
    """Read a size in pixels, given as one number or as a pair of equal ones."""
    value = reader.get(name)
    sides = [int_if_whole(side) for side in (value if isinstance(value, list) and len(value) == 2 else [value, value])]
    if sides[0] != sides[1] or any(type(side) is not int or not 1 <= side <= MAX_SIDE for side in sides):
        raise ConfigError(
            f"{reader.family}: {name}={str(value)[:80]} must be a whole number from 1 to {MAX_SIDE}, or two equal ones"
        )
    return sides[0]


def _tile(vision: VisionConfig, shuffle: int, rows: int) -> int:
    """Return the side in pixels of tiles that become `rows` rows (`image_seq_length`)."""
    side = round(rows**0.5)
    if side * side != rows:
        raise ConfigError(f"config.json: image_seq_length is {rows}; it must be a square number, as tiles are square")
    return side * shuffle * vision.patch_size
