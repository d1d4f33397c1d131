"""Nemotron-H and Nemotron 3 Nano (`NemotronHForCausalLM`, arXiv:2504.03624): Mamba-2, attention without rope, experts.

A block of a checkpoint is a norm with one of a Mamba-2 layer, attention, an MLP or experts. A layer here is a block
that mixes tokens with the MLP or the experts after it, if there are any, so that each layer has a place in the cache.

Time steps have no limits, as in NVIDIA's code. transformers 5.24 raises those of prompts to `time_step_min`, which is a
parameter of initialisation, and not those of the tokens after them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.checkpoint.weight_table import Rule, renamed
from jaxinfer.errors import ConfigError
from jaxinfer.layers.mamba import MambaSpec
from jaxinfer.layers.moe import MoEConfig
from jaxinfer.layers.norms import Scaling
from jaxinfer.layers.router import SIGMOID, RouterConfig
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, LINEAR, DecoderConfig
from jaxinfer.models.decoder_reader import read_config
from jaxinfer.models.mamba_reader import require_no_limit

MLP, MOE = "mlp", "moe"
BLOCKS = {"mamba": LINEAR, "attention": FULL, **{kind: kind for kind in (LINEAR, FULL, MLP, MOE)}}
"""Kinds of blocks as published, and as transformers writes them."""
PATTERN = {"M": LINEAR, "*": FULL, "-": MLP, "E": MOE}
"""The same in `hybrid_override_pattern`."""


@dataclass(frozen=True, kw_only=True)
class NemotronHConfig(DecoderConfig):
    """Decoder whose layers are one or two blocks of a checkpoint."""

    places: tuple[int, ...]
    """Block of each layer's token mixer; that of its MLP is the next one."""


def config(reader: ConfigReader) -> NemotronHConfig:
    """Read the configuration; the number of layers is that of the blocks which mix tokens."""
    # The first files name the width of a head `attention_head_dim`.
    width = reader.get("attention_head_dim", None)
    reader.defaults(head_dim=128 if width is None else width)
    reader.defaults(num_attention_heads=32, num_key_value_heads=8, intermediate_size=21_504)
    reader.defaults(max_position_embeddings=4096, mlp_hidden_act="relu2")
    reader.skip("hidden_act", "num_logits_to_keep", "residual_dropout", "hidden_dropout", "rescale_prenorm_residual")
    reader.skip("use_mamba_kernels", "mamba_ssm_cache_dtype", "chunk_size", "expand", "moe_shared_expert_overlap")
    reader.skip("n_shared_experts", "num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern")
    for name in ("attention_bias", "mamba_proj_bias", "residual_in_fp32"):
        reader.require(name, False)
    reader.require("mamba_hidden_act", "silu")
    blocks = _blocks(reader)
    places = [at for at, kind in enumerate(blocks) if kind in (LINEAR, FULL)]
    after = [blocks[at + 1] if blocks[at + 1 : at + 2] in ((MLP,), (MOE,)) else "" for at in places]
    reader.replace(num_hidden_layers=len(places))
    experts = _experts(reader)  # files of models without experts state them too
    # Attention has no rope, whatever its attributes say.
    made = read_config(
        reader,
        mlp_bias=reader.get_bool("mlp_bias", False),
        kinds=[blocks[at] for at in places],
        partial_rotary=True,
        moe=experts if MOE in after else None,
        dense_layers=[i for i, kind in enumerate(after) if kind != MOE] if MOE in after else (),
        activation="mlp_hidden_act",
        norm_eps=("layer_norm_epsilon", 1e-5),
        linear=_mamba(reader),
    )
    for name in ("rms_norm_eps", "norm_eps"):
        reader.require(name, made.norm_eps)
    bare = tuple(i for i, kind in enumerate(after) if not kind)
    made = replace(made, rope=None, norm_scaling=Scaling(wide=True), mlp_gated=False, bare_layers=bare)
    return NemotronHConfig(**{field.name: getattr(made, field.name) for field in fields(made)}, places=tuple(places))


def _blocks(reader: ConfigReader) -> tuple[str, ...]:
    """Read the kind of each block.

    Raises:
        ConfigError: a kind is unknown, or an MLP or experts do not follow a block that mixes tokens.
    """
    pattern = reader.get_str("hybrid_override_pattern", None)
    stated = [reader.get_list(name, None) for name in ("layers_block_type", "layer_types")]
    named = next((kinds for kinds in stated if kinds), [LINEAR, MOE, FULL, MLP])
    kinds, known = (list(pattern), PATTERN) if pattern and not any(stated) else (named, BLOCKS)
    for place, kind in enumerate(kinds):
        if not isinstance(kind, str) or kind not in known:
            raise ConfigError(
                f"{reader.family}: block {place} is {show(kind)}, which is not supported; it must be one of "
                f"{', '.join(map(repr, known))}"
            )
    blocks = tuple(known[kind] for kind in kinds)
    for place, kind in enumerate(blocks):
        if kind in (MLP, MOE) and (place == 0 or blocks[place - 1] in (MLP, MOE)):
            raise ConfigError(
                f"{reader.family}: block {place} is {kind!r}, but does not follow a Mamba or attention block, which is "
                "not supported (as in Nemotron-H-47B); models whose MLPs each follow another block are"
            )
    return blocks


def _mamba(reader: ConfigReader) -> MambaSpec:
    """Read the sizes of Mamba-2 layers."""
    require_no_limit(reader)
    reader.skip("time_step_min", "time_step_max", "time_step_floor")
    heads, groups = reader.get_int("mamba_num_heads", 128), reader.get_int("n_groups", 8)
    reader.divide("mamba_num_heads", heads, "n_groups", groups)
    bias = reader.get_bool("use_bias", False)
    return MambaSpec(
        reader.get_int("hidden_size"),
        heads,
        reader.get_int("mamba_head_dim", 64),
        groups,
        reader.get_int("ssm_state_size", 128),
        reader.get_int("conv_kernel", 4, least=2),
        conv_bias=reader.get_bool("use_conv_bias", True),
        in_bias=bias,
        out_bias=bias,
        norm_eps=reader.get_float("layer_norm_epsilon", 1e-5, above=0),
    )


def _experts(reader: ConfigReader) -> MoEConfig:
    """Read the mixture of experts; a projection of their inputs to fewer columns is refused."""
    reader.require("moe_latent_size")
    router = RouterConfig(
        SIGMOID,
        renormalise=reader.get_bool("norm_topk_prob", True),
        scale=reader.get_float("routed_scaling_factor", 1.0),
        correction=True,
        groups=reader.get_int("n_group", 1),
        chosen_groups=reader.get_int("topk_group", 1),
    )
    return MoEConfig(
        reader.get_int("n_routed_experts", 8),
        reader.get_int("num_experts_per_tok", 2),
        reader.get_int("moe_intermediate_size", 7688),
        router,
        reader.get_str("mlp_hidden_act"),
        gated=False,
        shared=reader.get_int("moe_shared_expert_intermediate_size", 7688),
    )


def rules(config: NemotronHConfig) -> list[Rule]:
    """Return the weight table."""
    names = {"model.norm.": "backbone.norm_f.", "model.embed_tokens.": "backbone.embeddings."}
    for layer, place in enumerate(config.places):
        names |= _names(f"model.layers.{layer}", place, ("input_layernorm", "self_attn", "mamba"))
        names |= _names(f"model.layers.{layer}", place + 1, ("post_attention_layernorm", "mlp"))
    return renamed(renamed(weight_rules(config), names), {"backbone.": "model."}, keep=True)


def _names(layer: str, place: int, parts: Sequence[str]) -> dict[str, str]:
    """Return the prefixes of a block's tensors by those of the parts of a layer: its norm, and its mixer."""
    norm, *mixers = parts
    block = f"backbone.layers.{place}"
    return {f"{layer}.{norm}.": f"{block}.norm.", **{f"{layer}.{part}.": f"{block}.mixer." for part in mixers}}


FAMILY = Family({"NemotronHForCausalLM": "nemotron_h"}, config, Decoder, rules)
