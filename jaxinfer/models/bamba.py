"""Bamba (`BambaForCausalLM`): Mamba-2 layers, and attention with rope over half of a head's columns in some."""

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.weight_table import Rule, renamed
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, LINEAR, DecoderConfig
from jaxinfer.models.decoder_reader import default_rotary_part, layer_kinds, read_config
from jaxinfer.models.mamba_reader import mamba_spec

NAMES = {
    "model.norm.": "model.final_layernorm.",
    ".post_attention_layernorm.": ".pre_ff_layernorm.",
    ".mlp.": ".feed_forward.",
}
"""Parts of tensor names: Llama's -> Bamba's."""


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; layers of `attn_layer_indices` have attention."""
    reader.defaults_if_absent(num_key_value_heads=8)
    reader.defaults(max_position_embeddings=262_144, rms_norm_eps=1e-5)
    reader.skip("num_logits_to_keep", "z_loss_coefficient")
    default_rotary_part(reader, 0.5)
    layers, full = reader.get_int("num_hidden_layers"), reader.get_list("attn_layer_indices", [])
    kinds = tuple(FULL if i in full else LINEAR for i in range(layers))
    bias = reader.get_bool("attention_bias", False)
    made = read_config(
        reader,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=reader.get_bool("mlp_bias", False),
        kinds=layer_kinds(reader, kinds, known=(FULL, LINEAR)),
        partial_rotary=True,
        linear=mamba_spec(reader, reader.get_float("rms_norm_eps", above=0)),
    )
    reader.require("attn_rotary_emb", made.rope.rotary_dim)
    return made


def rules(config: DecoderConfig) -> list[Rule]:
    """Return the weight table."""
    return renamed(weight_rules(config), NAMES)


FAMILY = Family({"BambaForCausalLM": "bamba"}, config, Decoder, rules)
