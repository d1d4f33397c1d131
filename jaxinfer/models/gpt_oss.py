"""gpt-oss (`GptOssForCausalLM`): windows in every other layer, a sink for each head, experts with biases (arXiv:2508.10925)."""

from dataclasses import replace
from functools import partial

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.checkpoint.interleaved import InterleavedExperts
from jaxinfer.layers.moe import ClampedSwiGLU, MoEConfig
from jaxinfer.layers.norms import Scaling
from jaxinfer.layers.router import RouterConfig
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, SLIDING, DecoderConfig, layer_kinds, read_config
from jaxinfer.models.moe_rules import MoENames

NAMES = MoENames(router="router")


def config(reader: ConfigReader) -> DecoderConfig:
    """The first layer slides. `intermediate_size` is the width of one expert, `hidden_act` nobody's.

    Experts in MXFP4 are read in the model's dtype, so `quantization_config` says nothing more.
    """
    reader.skip("output_router_logits", "router_aux_loss_coef")  # of training
    # Copies of num_experts_per_tok and of the rope's original length in the files of the Hub.
    reader.skip("hidden_act", "quantization_config", "experts_per_token", "initial_context_length")
    if not reader.get("rope_parameters", None):
        reader.defaults(rope_theta=150_000.0)
    reader.defaults(attention_bias=True, head_dim=64, sliding_window=128)
    activation = ClampedSwiGLU(reader.get_float("swiglu_alpha", 1.702), reader.get_float("swiglu_limit", 7.0))
    moe = MoEConfig(
        reader.get_int("num_local_experts", 128), reader.get_int("num_experts_per_tok", 4),
        reader.get_int("intermediate_size"), RouterConfig(bias=True), activation, bias=True,
    )  # fmt: skip
    bias, layers = reader.get_bool("attention_bias"), reader.get_int("num_hidden_layers")
    shared = read_config(
        reader, qkv_bias=bias, out_bias=bias, window=reader.get_int("sliding_window", None), moe=moe,
        kinds=layer_kinds(reader, [(SLIDING, FULL)[number % 2] for number in range(layers)]),
    )  # fmt: skip
    return replace(shared, attention=replace(shared.attention, sinks=True), norm_scaling=Scaling(wide=True))


FAMILY = Family(config, Decoder, partial(weight_rules, names=NAMES), source=InterleavedExperts)
