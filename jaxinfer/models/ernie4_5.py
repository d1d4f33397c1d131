"""ERNIE 4.5 dense (`Ernie4_5ForCausalLM`): Llama whose rope rotates neighbouring columns of a head."""

from dataclasses import replace

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig
from jaxinfer.models.decoder_reader import read_config


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; `use_bias` applies to all projections of attention and MLP."""
    reader.default_theta = 500_000.0
    reader.defaults_if_absent(num_key_value_heads=2, head_dim=128)
    reader.defaults(tie_word_embeddings=True, max_position_embeddings=131_072)
    bias = reader.get_bool("use_bias", False)
    shared = read_config(reader, qkv_bias=bias, out_bias=bias, mlp_bias=bias, norm_eps=("rms_norm_eps", 1e-5))
    return replace(shared, attention=replace(shared.attention, interleaved=True))


FAMILY = Family({"Ernie4_5ForCausalLM": "ernie4_5"}, config, Decoder, weight_rules)
