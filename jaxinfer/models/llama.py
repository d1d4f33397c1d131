"""Llama 1 to 3.x (`LlamaForCausalLM`): the base decoder (arXiv:2407.21783)."""

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds, read_config


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; `attention_bias` applies to q, k, v and o, `mlp_bias` to all three MLP projections.

    LLaMA 1 has no `max_position_embeddings`. A sliding window is refused unless it is off or covers all positions:
    transformers computes this architecture without one.
    """
    reader.defaults(max_position_embeddings=2048)
    window = reader.get_int("sliding_window", 0, least=0)
    if reader.get_bool("use_sliding_window", True) and window < reader.get_int("max_position_embeddings"):
        reader.require("sliding_window", 0)
    reader.skip("max_window_layers")
    layer_kinds(reader, [FULL] * reader.get_int("num_hidden_layers"), known=(FULL,))
    bias = reader.get_bool("attention_bias", False)
    mlp_bias = reader.get_bool("mlp_bias", False)
    return read_config(reader, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


FAMILY = Family({"LlamaForCausalLM": "llama"}, config, Decoder, weight_rules)
