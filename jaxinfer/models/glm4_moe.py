"""GLM-4.5 to 4.7 (`Glm4MoeForCausalLM`, arXiv:2508.06471): grouped queries, and DeepSeek-V3's mixture of experts."""

from functools import partial

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig
from jaxinfer.models.decoder_reader import default_rotary_part, read_config
from jaxinfer.models.deepseek_v3 import NAMES, experts


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; the first layers have an MLP, and `attention_bias` applies to q, k and v."""
    reader.defaults_if_absent(num_key_value_heads=8)
    reader.defaults(max_position_embeddings=131_072, rms_norm_eps=1e-5, moe_intermediate_size=1408)
    reader.defaults(n_routed_experts=128)
    default_rotary_part(reader, 0.5)
    layers = reader.get_int("num_hidden_layers")
    return read_config(
        reader,
        qkv_bias=reader.get_bool("attention_bias", False),
        qk_norm=reader.get_bool("use_qk_norm", False),
        partial_rotary=True,
        moe=experts(reader),
        dense_layers=range(min(layers, reader.get_int("first_k_dense_replace", 1, least=0))),
    )


FAMILY = Family({"Glm4MoeForCausalLM": "glm4_moe"}, config, Decoder, partial(weight_rules, names=NAMES))
