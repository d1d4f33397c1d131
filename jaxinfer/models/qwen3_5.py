"""Qwen3.5 (`Qwen3_5ForCausalLM`): Qwen3-Next with MLPs, and with separate projections in gated DeltaNet.

Of checkpoints that read images (`Qwen3_5ForConditionalGeneration`) only the text model is served.
"""

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig
from jaxinfer.models.decoder_reader import text_part
from jaxinfer.models.qwen3_next import hybrid

IMAGES = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
"""Attributes of config.json about images."""
NOT_TEXT = (r"(model\.)?visual\..*",)
"""Pattern of the vision tower's tensors."""


def text_config(reader: ConfigReader) -> ConfigReader:
    """Return the reader of the text model's configuration, with what both Qwen3.5 families have in common."""
    reader = text_part(reader, IMAGES)
    reader.defaults(vocab_size=248_320)
    reader.require("mamba_ssm_dtype", "float32")  # of the recurrent state
    reader.skip("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    return reader


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration of the text model."""
    reader = text_config(reader)
    reader.defaults_if_absent(num_key_value_heads=4)
    reader.defaults(hidden_size=4096, intermediate_size=12_288, num_hidden_layers=32, num_attention_heads=16)
    return hybrid(reader, grouped=False)


FAMILY = Family(
    {"Qwen3_5ForCausalLM": "qwen3_5_text", "Qwen3_5ForConditionalGeneration": "qwen3_5"},
    config,
    Decoder,
    weight_rules,
    ignored=NOT_TEXT,
)
