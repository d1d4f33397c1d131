"""Qwen3-Next (`Qwen3NextForCausalLM`, arXiv:2412.06464, arXiv:2505.06708): gated DeltaNet and experts.

Three gated DeltaNet layers per gated attention layer.
"""

from collections.abc import Sequence
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
from jaxinfer.models.decoder_reader import default_rotary_part, layer_kinds, read_config
from jaxinfer.models.moe_rules import MoENames
from jaxinfer.models.qwen3_moe import dense_layers

NAMES = MoENames(shared="shared_expert")
SCALING = Scaling(offset=1.0, wide=True)


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; layers without experts are those of `dense_layers`."""
    reader.defaults_if_absent(num_key_value_heads=2)
    return hybrid(reader, moe=experts(reader, 512, 10), dense_layers=dense_layers(reader))


def experts(reader: ConfigReader, count: int, active: int) -> MoEConfig:
    """Read the mixture of experts; `count` and `active` are the defaults of their number and of those of a token."""
    return MoEConfig(
        reader.get_int("num_experts", count),
        reader.get_int("num_experts_per_tok", active),
        reader.get_int("moe_intermediate_size", 512),
        RouterConfig(renormalise=reader.get_bool("norm_topk_prob", True)),
        reader.get_str("hidden_act", "silu"),
        shared=reader.get_int("shared_expert_intermediate_size", 512),
        shared_gate=True,
    )


def hybrid(
    reader: ConfigReader, *, moe: MoEConfig | None = None, dense_layers: Sequence[int] = (), grouped: bool = True
) -> DecoderConfig:
    """Read what Qwen3-Next and Qwen3.5 have in common.

    A quarter of a head's columns is rotated, and the gate of attention's output is fused with q.

    Args:
        reader: config.json.
        moe: mixture of experts of all layers but `dense_layers`; None for MLPs.
        dense_layers: layers with an MLP.
        grouped: whether the rows of gated DeltaNet's projections are grouped by key head (`DeltaNetSpec.grouped`).
    """
    reader.defaults(head_dim=256, max_position_embeddings=32_768)
    for name in ("attn_output_gate", "attention_output_gate"):
        reader.require(name, True)
    default_rotary_part(reader, 0.25)
    layers, every = reader.get_int("num_hidden_layers"), reader.get_int("full_attention_interval", 4)
    kinds = layer_kinds(reader, [LINEAR if (i + 1) % every else FULL for i in range(layers)], known=(FULL, LINEAR))
    bias = reader.get_bool("attention_bias", False)
    linear = DeltaNetSpec(
        reader.get_int("hidden_size"),
        reader.get_int("linear_num_key_heads", 16),
        reader.get_int("linear_key_head_dim", 128),
        reader.get_int("linear_num_value_heads", 32),
        reader.get_int("linear_value_head_dim", 128),
        reader.get_int("linear_conv_kernel_dim", 4, least=2),
        reader.get_float("rms_norm_eps", 1e-6, above=0),
        grouped=grouped,
    )
    made = read_config(
        reader,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        kinds=kinds,
        partial_rotary=True,
        moe=moe,
        dense_layers=dense_layers,
        linear=linear,
    )
    attention = replace(made.attention, gated=True, norm_scaling=SCALING)
    return replace(made, attention=attention, norm_scaling=SCALING)


FAMILY = Family({"Qwen3NextForCausalLM": "qwen3_next"}, config, Decoder, partial(weight_rules, names=NAMES))
