"""Ministral 3 (`Ministral3ForCausalLM`): Mistral with yarn, whose queries grow with their position.

Of checkpoints that read images (`Mistral3ForConditionalGeneration`) only the text model is served: Ministral 3's, or in
Mistral Small 3.1 and 3.2 Mistral's.
"""

from dataclasses import replace

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.errors import ConfigError
from jaxinfer.layers.attention import Growth
from jaxinfer.models import mistral
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig
from jaxinfer.models.decoder_reader import text_part
from jaxinfer.models.gemma3 import NOT_TEXT

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""`rope_parameters` of a file without them."""
IMAGES = (
    "vision_config",
    "image_token_index",
    "image_token_id",
    "projector_hidden_act",
    "vision_feature_layer",
    "multimodal_projector_bias",
    "spatial_merge_size",
)
"""Attributes of config.json about images."""


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration of the text model, which lies in `text_config` beside a vision tower's."""
    whole, reader = reader, text_part(reader, IMAGES)
    if reader is not whole and reader.get_choice("model_type", "mistral", ("mistral", "ministral3")) == "mistral":
        return mistral.config(reader)
    reader.defaults_if_absent(sliding_window=None, num_key_value_heads=8, head_dim=128)
    reader.defaults(max_position_embeddings=262_144, rms_norm_eps=1e-5)
    stated = reader.get("rope_parameters", None) or YARN
    if not isinstance(stated, dict):
        raise ConfigError(f"config.json: rope_parameters must be an object, got {type(stated).__name__}")
    reader.replace(
        rope_parameters={
            name: value
            for name, value in stated.items()
            if name not in ("llama_4_scaling_beta", "max_position_embeddings")
        }
    )
    made = mistral.config(reader)
    beta = stated.get("llama_4_scaling_beta")
    if not isinstance(beta, (int, float)) or isinstance(beta, bool) or beta < 0:
        raise ConfigError(
            f"config.json: rope_parameters.llama_4_scaling_beta is {beta!r}; it must be a number of 0 or more, by "
            "which queries grow"
        )
    length = made.rope.original_max_position
    if length is None:
        raise ConfigError(
            "config.json: rope_parameters.original_max_position_embeddings is missing; queries grow by multiples of it"
        )
    return replace(made, attention=replace(made.attention, query_growth=Growth(float(beta), length)))


FAMILY = Family(
    {"Ministral3ForCausalLM": "ministral3", "Mistral3ForConditionalGeneration": "mistral3"},
    config,
    Decoder,
    weight_rules,
    ignored=NOT_TEXT,
)
