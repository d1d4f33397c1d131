"""Olmo 2 (`Olmo2ForCausalLM`, arXiv:2501.00656): post-norms, and q and k norms that span the whole width."""

from dataclasses import replace

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import AFTER, FULL, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds, read_config
from jaxinfer.models.olmo3 import SCALING


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; `attention_bias` applies to q, k, v and o."""
    reader.defaults(max_position_embeddings=2048, rms_norm_eps=1e-5)
    layer_kinds(reader, [FULL] * reader.get_int("num_hidden_layers"), known=(FULL,))
    bias = reader.get_bool("attention_bias", False)
    shared = read_config(reader, qkv_bias=bias, out_bias=bias, qk_norm=True)
    attention = replace(shared.attention, norm_whole=True, norm_scaling=SCALING)
    return replace(shared, attention=attention, norms=(AFTER,), norm_scaling=SCALING)


FAMILY = Family({"Olmo2ForCausalLM": "olmo2"}, config, Decoder, weight_rules)
