"""Qwen3-Next (`Qwen3NextForCausalLM`, arXiv:2412.06464, arXiv:2505.06708): gated DeltaNet and experts.

Three gated DeltaNet layers per gated attention layer.
"""

from dataclasses import replace
from functools import partial

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.layers.delta_net import DeltaNetSpec
from jaxinfer.layers.moe import MoEConfig
from jaxinfer.layers.norms import Scaling
from jaxinfer.layers.router import RouterConfig
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, LINEAR, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds, read_config
from jaxinfer.models.moe_rules import MoENames
from jaxinfer.models.qwen3_moe import dense_layers

NAMES = MoENames(shared="shared_expert")
SCALING = Scaling(offset=1.0, wide=True)


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; a quarter of a head's columns is rotated, the output gate is fused with q."""
    reader.defaults_if_absent(num_key_value_heads=2)
    reader.defaults(head_dim=256, max_position_embeddings=32_768)
    for name in ("attn_output_gate", "attention_output_gate"):
        reader.require(name, True)
    stated = reader.get("rope_parameters", None) or {}
    if not isinstance(stated, dict) or "partial_rotary_factor" not in stated:
        reader.defaults(partial_rotary_factor=0.25)
    layers, every = reader.get_int("num_hidden_layers"), reader.get_int("full_attention_interval", 4)
    kinds = layer_kinds(reader, [LINEAR if (i + 1) % every else FULL for i in range(layers)], known=(FULL, LINEAR))
    moe = MoEConfig(
        reader.get_int("num_experts", 512),
        reader.get_int("num_experts_per_tok", 10),
        reader.get_int("moe_intermediate_size", 512),
        RouterConfig(renormalise=reader.get_bool("norm_topk_prob", True)),
        reader.get_str("hidden_act", "silu"),
        shared=reader.get_int("shared_expert_intermediate_size", 512),
        shared_gate=True,
    )
    bias = reader.get_bool("attention_bias", False)
    linear = DeltaNetSpec(
        reader.get_int("hidden_size"),
        reader.get_int("linear_num_key_heads", 16),
        reader.get_int("linear_key_head_dim", 128),
        reader.get_int("linear_num_value_heads", 32),
        reader.get_int("linear_value_head_dim", 128),
        reader.get_int("linear_conv_kernel_dim", 4, least=2),
        reader.get_float("rms_norm_eps", 1e-6, above=0),
    )
    made = read_config(
        reader,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        kinds=kinds,
        partial_rotary=True,
        moe=moe,
        dense_layers=dense_layers(reader),
        linear=linear,
    )
    attention = replace(made.attention, gated=True, norm_scaling=SCALING)
    return replace(made, attention=attention, norm_scaling=SCALING)


FAMILY = Family({"Qwen3NextForCausalLM": "qwen3_next"}, config, Decoder, partial(weight_rules, names=NAMES))
