"""Kimi-Linear (`KimiLinearForCausalLM`, arXiv:2510.26692): Kimi Delta Attention, latent attention, experts.

Three KDA layers per latent attention layer, without rotary positions.

config.json is read as on the Hub (`linear_attn_config`, layers counted from one) and as written by transformers
(`layer_types`).
"""

from dataclasses import replace
from functools import partial

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.errors import ConfigError
from jaxinfer.layers.kda import KdaSpec
from jaxinfer.layers.router import SIGMOID
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, LINEAR, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds
from jaxinfer.models.deepseek_v3 import experts, latent_spec, stack
from jaxinfer.models.moe_rules import MoENames

NAMES = MoENames(("block_sparse_moe", "mlp"), gate="w1", up="w3", down="w2")
HUB = {
    "num_experts": "num_local_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "num_expert_group": "n_group",
    "moe_renormalize": "norm_topk_prob",
    "model_max_length": "max_position_embeddings",
}
"""Attribute names on the Hub and in transformers."""


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; the `qk_rope_head_dim` columns are shared by all heads, but not rotated."""
    reader.skip("rope_theta", "rope_scaling", "rope_parameters", "use_grouped_topk")
    reader.require("moe_router_activation_func", SIGMOID)
    reader.require("mla_use_nope", True)
    reader.require("use_rope", False)
    names = {hub: hub if reader.has(hub) else own for hub, own in HUB.items()}
    reader.skip(*HUB, *HUB.values())
    reader.defaults(routed_scaling_factor=2.446, num_experts=256, num_local_experts=256)
    eps, layers = reader.get_float("rms_norm_eps", 1e-5, above=0), reader.get_int("num_hidden_layers")
    moe = experts(
        reader,
        count=names["num_experts"],
        per_token=names["num_experts_per_token"],
        shared=names["num_shared_experts"],
        groups=names["num_expert_group"],
        renormalise=names["moe_renormalize"],
    )
    made = stack(
        reader,
        latent_spec(reader, rotated=False),
        moe,
        _dense(reader, layers),
        max_position=reader.get_int(names["model_max_length"], 1048576),
        rope=None,
        eps=eps,
    )
    linear, kinds = _linear(reader, layers, eps)
    # The published model has a separate head, and transformers ties nothing, whatever tie_word_embeddings says.
    return replace(made, linear=linear, kinds=kinds, tied=False)


def _dense(reader: ConfigReader, layers: int) -> tuple[int, ...]:
    """Return the layers with an MLP."""
    kinds, first = reader.get("mlp_layer_types", None), reader.get_int("first_k_dense_replace", 1, least=0)
    if kinds is None:
        return tuple(range(min(first, layers)))
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in ("dense", "sparse") for kind in kinds):
        raise ConfigError(
            f"config.json: mlp_layer_types must be a list of num_hidden_layers = {layers} of 'dense' or 'sparse', got "
            f"{show(kinds)}"
        )
    return tuple(i for i, kind in enumerate(kinds) if kind == "dense")


def _linear(reader: ConfigReader, layers: int, eps: float) -> tuple[KdaSpec, tuple[str, ...]]:
    """Return the spec of the linear layers and the kind of every layer."""
    shape = {
        "head_dim": "linear_head_dim",
        "num_heads": "linear_num_heads",
        "short_conv_kernel_size": "linear_conv_kernel_dim",
    }
    reader.skip(*shape.values())
    nested = reader.get("linear_attn_config", None)
    if nested is None:
        part, names = reader, shape
        kinds = layer_kinds(reader, [FULL if i and i % 4 == 0 else LINEAR for i in range(layers)], known=(FULL, LINEAR))
    else:
        part, names = reader.part("linear_attn_config"), dict(zip(shape, shape, strict=True))
        kinds = _listed(part, layers)
        if reader.get("layer_types", None) not in (None, list(kinds)):
            raise ConfigError(
                "config.json: layer_types and linear_attn_config name different kinds of layers; remove one"
            )
        for own, flat in shape.items():
            if None not in (stated := (part.get(own, None), reader.get(flat, None))) and stated[0] != stated[1]:
                raise ConfigError(
                    f"config.json: linear_attn_config.{own} is {stated[0]!r} and {flat} is {stated[1]!r}; remove one"
                )
    heads, dim = part.get_int(names["num_heads"], 32), part.get_int(names["head_dim"], 128)
    taps = part.get_int(names["short_conv_kernel_size"], 4, least=2)
    return KdaSpec(reader.get_int("hidden_size"), heads, dim, heads, dim, taps, eps), kinds


def _listed(part: ConfigReader, layers: int) -> tuple[str, ...]:
    """Return layer kinds from `full_attn_layers` and `kda_layers`, which count from one.

    Raises:
        ConfigError: a layer is in neither list or in both, or out of range.
    """
    found: dict[int, str] = {}
    for name, kind in (("full_attn_layers", FULL), ("kda_layers", LINEAR)):
        listed = part.get(name)
        if not isinstance(listed, list) or not all(type(i) is int and 1 <= i <= layers for i in listed):
            raise ConfigError(
                f"config.json: linear_attn_config.{name} must be a list of layers from 1 to {layers} "
                f"(num_hidden_layers), got {show(listed)}"
            )
        twice = [i for i in listed if i in found or listed.count(i) > 1]
        if twice:
            raise ConfigError(
                f"config.json: linear_attn_config names layer {twice[0]} twice (counted from 1); keep it in one list"
            )
        found |= dict.fromkeys(listed, kind)
    absent = [i for i in range(1, layers + 1) if i not in found]
    if absent:
        raise ConfigError(
            f"config.json: layer {absent[0]} (counted from 1) is in neither full_attn_layers nor kda_layers of "
            "linear_attn_config; add it to one"
        )
    return tuple(found[i] for i in range(1, layers + 1))


FAMILY = Family({"KimiLinearForCausalLM": "kimi_linear"}, config, Decoder, partial(weight_rules, names=NAMES))
