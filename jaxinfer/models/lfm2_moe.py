"""LFM2 with experts (`Lfm2MoeForCausalLM`): LFM2 with MLPs in the first layers and experts in the others."""

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.weight_table import Rule, renamed
from jaxinfer.layers.moe import MoEConfig
from jaxinfer.layers.router import SIGMOID, RouterConfig
from jaxinfer.models import lfm2
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import DecoderConfig
from jaxinfer.models.moe_rules import MoENames

NAMES = MoENames(gate="w1", up="w3", down="w2")
CORRECTION = ".mlp.gate.e_score_correction_bias"


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; layers before `num_dense_layers` have an MLP."""
    layers, dense = reader.get_int("num_hidden_layers"), reader.get_int("num_dense_layers", 2, least=0)
    reader.defaults(intermediate_size=7168)
    router = RouterConfig(
        SIGMOID,
        renormalise=reader.get_bool("norm_topk_prob", True),
        scale=reader.get_float("routed_scaling_factor", 1.0),
        correction=reader.get_bool("use_expert_bias", True),
        epsilon=1e-6,
    )
    moe = MoEConfig(
        reader.get_int("num_experts", 32),
        reader.get_int("num_experts_per_tok", 4),
        reader.get_int("moe_intermediate_size", 1792),
        router,
    )
    return lfm2.hybrid(reader, moe=moe, dense_layers=range(min(dense, layers)))


def rules(config: DecoderConfig) -> list[Rule]:
    """Return the weight table."""
    table = weight_rules(config, names=NAMES)
    return renamed(table, {CORRECTION: ".feed_forward.expert_bias", **lfm2.NAMES, ".mlp.": ".feed_forward."})


FAMILY = Family({"Lfm2MoeForCausalLM": "lfm2_moe"}, config, Decoder, rules)
