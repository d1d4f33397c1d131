"""Granite 4 (`GraniteMoeHybridForCausalLM`): Mamba-2 and attention layers, experts or MLPs, Granite's multipliers."""

from dataclasses import replace
from functools import partial

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.weight_table import Rule, expand, renamed
from jaxinfer.layers.moe import MoEConfig
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, LINEAR
from jaxinfer.models.decoder_reader import layer_kinds, read_config
from jaxinfer.models.granite import GraniteConfig, GraniteLayer, multiplied
from jaxinfer.models.mamba_reader import mamba_spec
from jaxinfer.models.moe_rules import MoENames

KINDS = {"mamba": LINEAR, "attention": FULL, LINEAR: LINEAR, FULL: FULL}
"""Kinds of layers as published, and as transformers writes them."""
NAMES = MoENames(("block_sparse_moe",), router="router")
PUBLISHED = {
    ".experts.gate_up_proj": ".input_linear.weight",
    ".experts.down_proj": ".output_linear.weight",
    ".router.weight": ".router.layer.weight",
}
"""Parts of tensor names: transformers' -> those of published files."""


def config(reader: ConfigReader) -> GraniteConfig:
    """Read the configuration; every layer has an MLP of `shared_intermediate_size`, beside experts if there are any."""
    reader.defaults_if_absent(num_local_experts=8)
    reader.defaults(max_position_embeddings=2048)
    reader.require("normalization_function", "rmsnorm")
    reader.skip("init_method")  # how the weights were initialised
    rotated = reader.get("position_embedding_type", None) == "rope"
    reader.require("position_embedding_type", "rope", "nope")
    ffn, layers = reader.get_int("shared_intermediate_size", 1024), reader.get_int("num_hidden_layers")
    stated = reader.get("layers_block_type", None)
    if stated is not None and not reader.has("layer_types"):
        reader.replace(layer_types=stated)
    kinds = layer_kinds(reader, [LINEAR] * layers, known=tuple(KINDS))
    bias = reader.get_bool("attention_bias", False)
    width = reader.get_int("intermediate_size")
    reader.replace(intermediate_size=ffn)
    shared = read_config(
        reader,
        qkv_bias=bias,
        out_bias=bias,
        kinds=tuple(KINDS[kind] for kind in kinds),
        moe=_experts(reader, width, ffn),
        linear=mamba_spec(reader, reader.get_float("rms_norm_eps", 1e-6, above=0)),
    )
    return multiplied(reader, shared if rotated else replace(shared, rope=None))


def _experts(reader: ConfigReader, width: int, shared: int) -> MoEConfig | None:
    """Read the mixture of experts; None if there are no experts.

    Args:
        reader: config.json.
        width: F of one expert.
        shared: F of the shared expert.
    """
    experts = reader.get_int("num_local_experts", least=0)
    per_token = reader.get_int("num_experts_per_tok", 2, least=0)
    if not experts:
        return None
    return MoEConfig(experts, per_token, width, activation=reader.get_str("hidden_act", "silu"), shared=shared)


def rules(config: GraniteConfig) -> list[Rule]:
    """Return the weight table."""
    mlp = ".mlp." if config.moe is None else ".mlp.shared."
    table = [rule for rule in weight_rules(config, names=NAMES, block=GraniteLayer) if mlp not in str(rule.target)]
    own = "model.layers.{i}.shared_mlp", f"layers.{{i}}{mlp}"
    dense = [
        Rule(f"{own[0]}.input_linear.weight", f"{own[1]}gate_up.weight", ("gate", "up")),
        Rule(f"{own[0]}.output_linear.weight", f"{own[1]}down.weight"),
    ]
    return renamed(table, PUBLISHED, keep=True) + expand(dense, config.num_layers)


FAMILY = Family(
    {"GraniteMoeHybridForCausalLM": "granitemoehybrid"}, config, partial(Decoder, block=GraniteLayer), rules
)
