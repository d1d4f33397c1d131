"""Olmo 3 (`Olmo3ForCausalLM`): norms after attention and MLP, and of queries and keys over their whole width, as Olmo 2
has them (arXiv:2501.00656); three sliding layers for a full one.
"""

from dataclasses import replace

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.layers.norms import Scaling
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import AFTER, FULL, SLIDING, DecoderConfig, layer_kinds, read_config

SCALING = Scaling(wide=True)


def config(reader: ConfigReader) -> DecoderConfig:
    """`rope_scaling` is that of full layers alone; all have one `rope_theta`."""
    if not reader.get("rope_parameters", None):
        reader.defaults(rope_theta=500_000.0)
    reader.defaults(sliding_window=4096)
    bias, layers = reader.get_bool("attention_bias", False), reader.get_int("num_hidden_layers")
    kinds = [SLIDING if number % 4 else FULL for number in range(1, layers + 1)]
    shared = read_config(
        reader, qkv_bias=bias, out_bias=bias, qk_norm=True, window=reader.get_int("sliding_window", None),
        kinds=layer_kinds(reader, kinds), local_rope={"rope_scaling": None},
    )  # fmt: skip
    attention = replace(shared.attention, norm_whole=True, norm_scaling=SCALING)
    return replace(shared, attention=attention, norms=(AFTER,), norm_scaling=SCALING)


FAMILY = Family(config, Decoder, weight_rules)
