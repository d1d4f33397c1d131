"""Helium 1 preview (`HeliumForCausalLM`): Llama whose rope rotates neighbouring columns."""

from dataclasses import replace

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.layers.norms import Scaling
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig
from jaxinfer.models.decoder_reader import read_config


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; `attention_bias` applies to q, k and v, and o never has a bias."""
    reader.default_theta = 100_000.0
    reader.defaults_if_absent(num_key_value_heads=20, head_dim=128)
    reader.defaults(max_position_embeddings=4096, rms_norm_eps=1e-8)
    shared = read_config(
        reader, qkv_bias=reader.get_bool("attention_bias", False), mlp_bias=reader.get_bool("mlp_bias", False)
    )
    return replace(shared, attention=replace(shared.attention, interleaved=True), norm_scaling=Scaling(wide=True))


FAMILY = Family({"HeliumForCausalLM": "helium"}, config, Decoder, weight_rules)
