"""Mixtral (`MixtralForCausalLM`): Mistral with experts in every layer (arXiv:2401.04088)."""

from functools import partial

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.layers.moe import MoEConfig
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig
from jaxinfer.models.decoder_reader import read_config, window_of
from jaxinfer.models.moe_rules import MoENames

NAMES = MoENames(("block_sparse_moe", "mlp"), gate="w1", up="w3", down="w2")


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; `intermediate_size` is the width of one expert."""
    reader.defaults_if_absent(num_key_value_heads=8)
    reader.defaults(max_position_embeddings=131_072, rms_norm_eps=1e-5)
    reader.default_theta = 1_000_000.0
    reader.require("norm_topk_prob", True)
    moe = MoEConfig(
        reader.get_int("num_local_experts", 8),
        reader.get_int("num_experts_per_tok", 2),
        reader.get_int("intermediate_size"),
        activation=reader.get_str("hidden_act", "silu"),
    )
    return read_config(reader, window=window_of(reader), moe=moe)


FAMILY = Family({"MixtralForCausalLM": "mixtral"}, config, Decoder, partial(weight_rules, names=NAMES))
