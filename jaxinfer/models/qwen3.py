"""Qwen3 dense (`Qwen3ForCausalLM`): an RMSNorm on each query and key head (arXiv:2505.09388)."""

from typing import Any

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig
from jaxinfer.models.decoder_reader import read_config
from jaxinfer.models.qwen2 import windows


def config(reader: ConfigReader, **more: Any) -> DecoderConfig:
    """Read the configuration; `attention_bias` applies to q, k, v and o.

    `more` are arguments of `decoder_reader.read_config`; families with experts set their own defaults first.
    """
    if "moe" not in more:
        reader.defaults_if_absent(num_key_value_heads=32)
        reader.defaults(head_dim=128)
    reader.defaults(max_position_embeddings=32_768)
    bias = reader.get_bool("attention_bias", False)
    return read_config(reader, qkv_bias=bias, out_bias=bias, qk_norm=True, **windows(reader), **more)


FAMILY = Family({"Qwen3ForCausalLM": "qwen3"}, config, Decoder, weight_rules)
