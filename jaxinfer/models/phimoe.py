"""Phi-3.5-MoE (`PhimoeForCausalLM`, arXiv:2404.14219): experts chosen by SparseMixer, layer norms, longrope.

A sequence longer than longrope's original length has the long factors, as in the published code and in Phi-3.
transformers 5.24 selects only their scale by the length, and rotates by the short factors.
"""

from dataclasses import replace

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.weight_table import Rule, renamed
from jaxinfer.layers.moe import MoEConfig
from jaxinfer.layers.router import SPARSEMIXER, RouterConfig
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig
from jaxinfer.models.decoder_reader import read_config, window_of
from jaxinfer.models.moe_rules import MoENames

NAMES = MoENames(("block_sparse_moe", "mlp"), gate="w1", up="w3", down="w2")


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; `intermediate_size` is the width of one expert."""
    reader.default_theta = 1_000_000.0
    reader.defaults_if_absent(num_key_value_heads=8)
    reader.defaults(max_position_embeddings=131_072, rms_norm_eps=1e-5)
    reader.skip("input_jitter_noise", "hidden_dropout")  # in training only
    bias = reader.get_bool("attention_bias", False)
    moe = MoEConfig(
        reader.get_int("num_local_experts", 16),
        reader.get_int("num_experts_per_tok", 2),
        reader.get_int("intermediate_size"),
        RouterConfig(SPARSEMIXER, jitter=reader.get_float("router_jitter_noise", 0.01)),
        reader.get_str("hidden_act", "silu"),
    )
    head_bias = reader.get_bool("lm_head_bias", False)
    made = read_config(reader, qkv_bias=bias, out_bias=bias, window=window_of(reader), moe=moe)
    return replace(made, centred_norms=True, norm_bias=True, head_bias=head_bias, recomputed=True)


def rules(config: DecoderConfig) -> list[Rule]:
    """Return the weight table."""
    return renamed(weight_rules(config, names=NAMES), {".gate.weight": ".router.weight"}, keep=True)


FAMILY = Family({"PhimoeForCausalLM": "phimoe"}, config, Decoder, rules)
