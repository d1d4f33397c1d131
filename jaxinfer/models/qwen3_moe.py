"""Qwen3 with experts (`Qwen3MoeForCausalLM`): Qwen3's attention, a softmax router (arXiv:2505.09388)."""

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.errors import ConfigError
from jaxinfer.layers.moe import MoEConfig
from jaxinfer.layers.router import RouterConfig
from jaxinfer.models import qwen3
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig


def dense_layers(reader: ConfigReader) -> tuple[int, ...]:
    """Return layers with an MLP: `mlp_only_layers`, and all but every `decoder_sparse_step`-th, counted from one.

    Raises:
        ConfigError: a layer number is out of range.
    """
    layers, step = reader.get_int("num_hidden_layers"), reader.get_int("decoder_sparse_step", 1)
    named = reader.get("mlp_only_layers", [])
    if not isinstance(named, list) or not all(type(i) is int and 0 <= i < layers for i in named):
        raise ConfigError(
            f"config.json: mlp_only_layers is {show(named)}; it must be a list of layers from 0 to {layers - 1}"
        )
    dense = set(named)
    return tuple(i for i in range(layers) if i in dense or (i + 1) % step)


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; `intermediate_size` is the width of the layers without experts."""
    reader.defaults_if_absent(num_key_value_heads=4)
    reader.require("shared_expert_intermediate_size", 0)
    router = RouterConfig(renormalise=reader.get_bool("norm_topk_prob", False))
    experts = reader.get_int("num_local_experts", 128)
    moe = MoEConfig(
        reader.get_int("num_experts", experts),
        reader.get_int("num_experts_per_tok", 8),
        reader.get_int("moe_intermediate_size", 768),
        router,
        activation=reader.get_str("hidden_act", "silu"),
    )
    return qwen3.config(reader, moe=moe, dense_layers=dense_layers(reader))


FAMILY = Family({"Qwen3MoeForCausalLM": "qwen3_moe"}, config, Decoder, weight_rules)
