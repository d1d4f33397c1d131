"""Seed-OSS (`SeedOssForCausalLM`): Llama with biases on q, k and v."""

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds, read_config


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; `attention_bias` applies to q, k and v, `attention_out_bias` to o."""
    reader.defaults_if_absent(num_key_value_heads=8, head_dim=128)
    reader.defaults(max_position_embeddings=524_288)
    layer_kinds(reader, [FULL] * reader.get_int("num_hidden_layers"), known=(FULL,))
    return read_config(
        reader,
        qkv_bias=reader.get_bool("attention_bias", True),
        out_bias=reader.get_bool("attention_out_bias", False),
        mlp_bias=reader.get_bool("mlp_bias", False),
    )


FAMILY = Family({"SeedOssForCausalLM": "seed_oss"}, config, Decoder, weight_rules)
