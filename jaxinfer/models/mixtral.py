"""Mixtral (`MixtralForCausalLM`): Mistral with experts in every layer (arXiv:2401.04088)."""

from functools import partial

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.layers.moe import MoEConfig
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig, read_config
from jaxinfer.models.moe_rules import MoENames

NAMES = MoENames(("block_sparse_moe", "mlp"), gate="w1", up="w3", down="w2")


def config(reader: ConfigReader) -> DecoderConfig:
    """`intermediate_size` is the width of one expert."""
    reader.skip("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")  # of training
    moe = MoEConfig(
        reader.get_int("num_local_experts", 8), reader.get_int("num_experts_per_tok", 2),
        reader.get_int("intermediate_size"), activation=reader.get_str("hidden_act", "silu"),
    )  # fmt: skip
    return read_config(reader, window=reader.get_int("sliding_window", None), moe=moe)


FAMILY = Family(config, Decoder, partial(weight_rules, names=NAMES))
