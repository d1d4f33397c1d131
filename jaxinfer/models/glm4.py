"""GLM-4-0414 (`Glm4ForCausalLM`): norms before and after attention and MLP, rope over half of a head's columns."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.weight_table import Rule
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, Layer, weight_rules
from jaxinfer.models.decoder_config import AFTER, BEFORE, DecoderConfig
from jaxinfer.models.decoder_reader import default_rotary_part, read_config


class Glm4Layer(Layer):
    """Decoder layer with GLM-4's names of norms."""

    @staticmethod
    def norm_names(config: DecoderConfig) -> Mapping[str, str]:
        """Return the norms of a layer: attribute name to name in checkpoints."""
        return {
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_self_attn_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        }


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; `attention_bias` applies to q, k and v."""
    reader.defaults_if_absent(num_key_value_heads=2, head_dim=128)
    reader.defaults(max_position_embeddings=131_072, rms_norm_eps=1.5625e-07)
    default_rotary_part(reader, 0.5)
    shared = read_config(reader, qkv_bias=reader.get_bool("attention_bias", True), partial_rotary=True)
    return replace(shared, attention=replace(shared.attention, interleaved=True), norms=(BEFORE, AFTER))


def rules(config: DecoderConfig) -> list[Rule]:
    """Return the weight table: checkpoints keep gate and up in one tensor, and q, k and v in three."""
    separate, fused = (weight_rules(config, fused=fused, block=Glm4Layer) for fused in (False, True))
    return [
        *(rule for rule in separate if ".mlp." not in rule.target),
        *(rule for rule in fused if ".mlp." in rule.target),
    ]


FAMILY = Family({"Glm4ForCausalLM": "glm4"}, config, partial(Decoder, block=Glm4Layer), rules)
