"""LFM2 (`Lfm2ForCausalLM`, arXiv:2511.23404): gated short convolutions, with attention in some layers."""

from collections.abc import Sequence
from dataclasses import replace

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.checkpoint.weight_table import Rule, renamed
from jaxinfer.errors import ConfigError
from jaxinfer.layers.moe import MoEConfig
from jaxinfer.layers.short_conv import ShortConvSpec
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, LINEAR, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds, read_config

CONV = "conv"
"""Kind of the layers without attention, in `layer_types`."""

NAMES = {
    "model.norm.": "model.embedding_norm.",
    ".input_layernorm.": ".operator_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".self_attn.o_proj.": ".self_attn.out_proj.",
    ".self_attn.q_norm.": ".self_attn.q_layernorm.",
    ".self_attn.k_norm.": ".self_attn.k_layernorm.",
}
"""Parts of tensor names: Llama's -> LFM2's."""
OTHER_NAMES = {
    "block_ff_dim": "intermediate_size",
    "tie_embedding": "tie_word_embeddings",
    "theta": "rope_theta",
    "num_heads": "num_attention_heads",
    "block_norm_eps": "norm_eps",
    "block_dim": "hidden_size",
    "conv_dim": "hidden_size",
    "conv_dim_out": "hidden_size",
}
"""Attributes of the published files that repeat another one; the first two replace it, as in transformers."""


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; the MLP's width is computed from `intermediate_size` with `block_auto_adjust_ff_dim`."""
    reader.defaults(intermediate_size=12_288)
    reader.defaults_if_absent(block_ffn_dim_multiplier=1.0)
    reader.require("block_use_swiglu", True)
    # How the weights were initialised.
    reader.skip("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init")
    made = hybrid(reader)
    return replace(made, ffn=_ffn(reader))


def hybrid(reader: ConfigReader, *, moe: MoEConfig | None = None, dense_layers: Sequence[int] = ()) -> DecoderConfig:
    """Read what LFM2 with and without experts have in common.

    Args:
        reader: config.json.
        moe: mixture of experts of all layers but `dense_layers`; None for MLPs.
        dense_layers: layers with an MLP.
    """
    reader.default_theta = 1_000_000.0
    reader.defaults(num_key_value_heads=8, max_position_embeddings=128_000, tie_word_embeddings=True)
    _repeated(reader)
    reader.require("use_pos_enc", True)
    linear = ShortConvSpec(
        reader.get_int("hidden_size"), reader.get_int("conv_L_cache", 3, least=2), reader.get_bool("conv_bias", False)
    )
    return read_config(
        reader,
        qk_norm=True,
        kinds=_kinds(reader),
        norm_eps=("norm_eps", 1e-5),
        linear=linear,
        moe=moe,
        dense_layers=dense_layers,
    )


def _repeated(reader: ConfigReader) -> None:
    """Read the attributes that repeat others.

    Raises:
        ConfigError: one that transformers ignores differs from what it repeats.
    """
    for name, repeated in OTHER_NAMES.items():
        value = reader.get(name, None)
        if value is None:
            continue
        if name in ("block_ff_dim", "tie_embedding"):
            reader.replace(**{repeated: value})
        elif (other := reader.get(repeated, None)) not in (None, value):
            raise ConfigError(f"{reader.family}: {name} is {show(value)} and {repeated} is {show(other)}; remove one")


def _ffn(reader: ConfigReader) -> int:
    """Return the width of the MLP, rounded as transformers does."""
    ffn, multiple = reader.get_int("intermediate_size"), reader.get_int("block_multiple_of", 256)
    multiplier = reader.get_float("block_ffn_dim_multiplier", None, above=0)
    if not reader.get_bool("block_auto_adjust_ff_dim", True):
        return ffn
    ffn = int(2 * ffn / 3)
    return ffn if multiplier is None else multiple * -(-int(multiplier * ffn) // multiple)


def _kinds(reader: ConfigReader) -> tuple[str, ...]:
    """Return the kind of each layer: `layer_types`, or attention in the layers `full_attn_idxs`."""
    layers = reader.get_int("num_hidden_layers")
    full = reader.get_list("full_attn_idxs", list(range(layers)))
    kinds = layer_kinds(reader, [FULL if i in full else CONV for i in range(layers)], known=(FULL, CONV))
    return tuple(LINEAR if kind == CONV else kind for kind in kinds)


def rules(config: DecoderConfig) -> list[Rule]:
    """Return the weight table."""
    return renamed(weight_rules(config), NAMES)


FAMILY = Family({"Lfm2ForCausalLM": "lfm2"}, config, Decoder, rules)
