"""Olmo 3 (`Olmo3ForCausalLM`): post-norms, three sliding layers per full layer (Olmo 2: arXiv:2501.00656).

As in Olmo 2, q and k norms span the whole width.
"""

from dataclasses import replace

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.layers.norms import Scaling
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import AFTER, FULL, SLIDING, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds, read_config, window_of

SCALING = Scaling(wide=True)


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; `rope_scaling` applies to full layers only, `rope_theta` to all."""
    reader.default_theta = 500_000.0
    reader.defaults_if_absent(sliding_window=4096)
    reader.defaults(max_position_embeddings=2048, rms_norm_eps=1e-5)
    bias, layers = reader.get_bool("attention_bias", False), reader.get_int("num_hidden_layers")
    kinds = [SLIDING if number % 4 else FULL for number in range(1, layers + 1)]
    shared = read_config(
        reader,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        window=window_of(reader),
        kinds=layer_kinds(reader, kinds),
        local_rope={"rope_scaling": None},
    )
    attention = replace(shared.attention, norm_whole=True, norm_scaling=SCALING)
    return replace(shared, attention=attention, norms=(AFTER,), norm_scaling=SCALING)


FAMILY = Family({"Olmo3ForCausalLM": "olmo3"}, config, Decoder, weight_rules)
