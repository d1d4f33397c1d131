"""Llama 1 to 3.x (`LlamaForCausalLM`): the plain member of the stack (arXiv:2407.21783)."""

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig, read_config


def config(reader: ConfigReader) -> DecoderConfig:
    """`attention_bias` puts a bias on q, k, v and o alike; `mlp_bias` on all three of the MLP."""
    bias = reader.get_bool("attention_bias", False)
    mlp_bias = reader.get_bool("mlp_bias", False)
    reader.skip("pretraining_tp")  # a split of the same matmul, no other numbers
    return read_config(reader, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


FAMILY = Family(config, Decoder, weight_rules)
