"""gpt-oss (`GptOssForCausalLM`, arXiv:2508.10925): alternating sliding windows, attention sinks, biased experts."""

from dataclasses import replace
from functools import partial

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.gpt_oss_weights import InterleavedExperts, interleave
from jaxinfer.layers.moe import ClampedSwiGLU, MoEConfig
from jaxinfer.layers.norms import Scaling
from jaxinfer.layers.router import RouterConfig
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, SLIDING, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds, read_config, window_of
from jaxinfer.models.moe_rules import MoENames

NAMES = MoENames(router="router")
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Default rotary embedding, if config.json states none."""


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; the first layer slides, and `hidden_act` is unused.

    `intermediate_size` is the width of one expert.
    """
    # Copies of num_experts_per_tok and of rope's original length, in files on the Hub.
    reader.skip("hidden_act", "experts_per_token", "initial_context_length")
    reader.require("norm_topk_prob", True)
    reader.default_theta = 150_000.0
    if not reader.get("rope_scaling", None):
        reader.defaults(rope_parameters=ROPE)
    reader.defaults_if_absent(sliding_window=128, num_key_value_heads=8)
    reader.defaults(attention_bias=True, head_dim=64, max_position_embeddings=131_072, rms_norm_eps=1e-5)
    limit = reader.get_float("swiglu_limit", 7.0, above=0)
    activation = ClampedSwiGLU(reader.get_float("swiglu_alpha", 1.702), limit)
    moe = MoEConfig(
        reader.get_int("num_local_experts", 128),
        reader.get_int("num_experts_per_tok", 4),
        reader.get_int("intermediate_size"),
        RouterConfig(bias=True),
        activation,
        bias=True,
    )
    bias, layers = reader.get_bool("attention_bias"), reader.get_int("num_hidden_layers")
    shared = read_config(
        reader,
        qkv_bias=bias,
        out_bias=bias,
        window=window_of(reader),
        moe=moe,
        kinds=layer_kinds(reader, [(SLIDING, FULL)[number % 2] for number in range(layers)]),
    )
    return replace(shared, attention=replace(shared.attention, sinks=True), norm_scaling=Scaling(wide=True))


FAMILY = Family(
    {"GptOssForCausalLM": "gpt_oss"},
    config,
    Decoder,
    partial(weight_rules, names=NAMES),
    source=InterleavedExperts,
    restore=interleave,
    stored_dtype="bfloat16",
)
