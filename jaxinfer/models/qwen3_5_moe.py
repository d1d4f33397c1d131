"""Qwen3.5 with experts (`Qwen3_5MoeForCausalLM`): Qwen3.5 with a mixture of experts in each layer.

Of checkpoints that read images (`Qwen3_5MoeForConditionalGeneration`) only the text model is served.
"""

from functools import partial

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig
from jaxinfer.models.qwen3_5 import NOT_TEXT, text_config
from jaxinfer.models.qwen3_next import NAMES, experts, hybrid


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration of the text model; the router's probabilities are always renormalised."""
    reader = text_config(reader)
    reader.defaults_if_absent(num_key_value_heads=2)
    reader.defaults(hidden_size=2048, num_hidden_layers=40, num_attention_heads=16)
    reader.defaults(intermediate_size=reader.get_int("moe_intermediate_size", 512))  # no layer has an MLP
    reader.require("norm_topk_prob", True)
    return hybrid(reader, moe=experts(reader, 256, 8), grouped=False)


FAMILY = Family(
    {"Qwen3_5MoeForCausalLM": "qwen3_5_moe_text", "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe"},
    config,
    Decoder,
    partial(weight_rules, names=NAMES),
    ignored=NOT_TEXT,
)
