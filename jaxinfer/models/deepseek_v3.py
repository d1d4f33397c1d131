"""DeepSeek-V3 (`DeepseekV3ForCausalLM`): latent attention, and experts chosen in groups (arXiv:2412.19437)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.errors import ConfigError
from jaxinfer.layers.mla import LatentSpec
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.moe import MoEConfig
from jaxinfer.layers.rope import RopeConfig
from jaxinfer.layers.router import SIGMOID, RouterConfig
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_attributes import one_values
from jaxinfer.models.decoder_config import FULL, DecoderConfig
from jaxinfer.models.moe_rules import MoENames

NAMES = MoENames()
LATENT_NORM_EPS = 1e-6
"""Epsilon of the latents' norms, whatever `rms_norm_eps` says: transformers and the published code use the default."""


def latent_spec(reader: ConfigReader, *, rotated: bool) -> LatentSpec:
    """Read the latent attention spec; `rotated` says whether the shared columns are rotated."""
    own, shared = reader.get_int("qk_nope_head_dim", 128), reader.get_int("qk_rope_head_dim", 64)
    heads = reader.get_int("num_attention_heads")
    kv_heads = reader.get_int("num_key_value_heads", heads)
    if kv_heads != heads:
        raise ConfigError(
            f"config.json: num_key_value_heads is {kv_heads}, but all {heads} heads read one latent; set it to "
            "num_attention_heads"
        )
    reader.skip("head_dim")  # derived from others in transformers' files, unused in published ones
    reader.require("qk_head_dim", own + shared)
    return LatentSpec(
        reader.get_int("hidden_size"),
        heads,
        rank=reader.get_int("kv_lora_rank", 512),
        key_dim=own,
        shared_dim=shared,
        value_dim=reader.get_int("v_head_dim", 128),
        scale=(own + shared) ** -0.5,
        query_rank=reader.get_int("q_lora_rank", None),
        norm_eps=LATENT_NORM_EPS,
        interleaved=rotated and reader.get_bool("rope_interleave", True),
        bias=reader.get_bool("attention_bias", False),
    )


def experts(
    reader: ConfigReader,
    *,
    count: str = "n_routed_experts",
    per_token: str = "num_experts_per_tok",
    shared: str = "n_shared_experts",
    groups: str = "n_group",
    renormalise: str = "norm_topk_prob",
) -> MoEConfig:
    """Read the mixture of experts, whose attribute names differ between families."""
    for name, value in ("scoring_func", SIGMOID), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1):
        reader.require(name, value)
    width, one = reader.get_int("moe_intermediate_size"), reader.get_int(groups, 1)
    router = RouterConfig(
        SIGMOID,
        reader.get_bool(renormalise, True),
        reader.get_float("routed_scaling_factor", 1.0),
        correction=True,
        groups=one,
        chosen_groups=reader.get_int("topk_group", 1),
    )
    return MoEConfig(
        reader.get_int(count),
        reader.get_int(per_token, 8),
        width,
        router,
        reader.get_str("hidden_act", "silu"),
        shared=width * reader.get_int(shared, 1, least=0),
    )


def stack(
    reader: ConfigReader,
    attention: LatentSpec,
    moe: MoEConfig,
    dense: Sequence[int],
    *,
    max_position: int,
    rope: RopeConfig | None,
    eps: float,
) -> DecoderConfig:
    """Read the remaining decoder configuration.

    Args:
        reader: config.json.
        attention: latent attention spec.
        moe: mixture of experts.
        dense: layers with an MLP.
        max_position: maximum number of positions.
        rope: rotary embedding; None for no positional encoding.
        eps: epsilon of the norms, except those of the latents.
    """
    reader.restrict(one_values(qk_norm=False, experts=True) | {"use_qk_norm": (False, True)})
    layers, activation = reader.get_int("num_hidden_layers"), reader.get_choice("hidden_act", "silu", ACTIVATIONS)
    return DecoderConfig(
        vocab_size=reader.get_int("vocab_size"),
        num_layers=layers,
        ffn=reader.get_int("intermediate_size"),
        activation=activation,
        norm_eps=eps,
        attention=attention,
        rope=rope,
        max_position=max_position,
        kinds=(FULL,) * layers,
        moe=moe,
        dense_layers=tuple(dense),
        tied=reader.get_bool("tie_word_embeddings", False),
    )


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; the first layers are dense, and yarn's squared factor scales the scores as well."""
    reader.defaults_if_absent(q_lora_rank=1536)
    reader.defaults(n_group=8, topk_group=4, routed_scaling_factor=2.5, max_position_embeddings=4096)
    eps, layers = reader.get_float("rms_norm_eps", 1e-6, above=0), reader.get_int("num_hidden_layers")
    attention = latent_spec(reader, rotated=True)
    moe = experts(reader)
    rope = reader.rope(attention.shared_dim)
    dense = range(min(layers, reader.get_int("first_k_dense_replace", 3, least=0)))
    attention = replace(attention, scale=attention.scale * _score_factor(rope) ** 2)
    position = reader.get_int("max_position_embeddings")
    return stack(reader, attention, moe, dense, max_position=position, rope=rope, eps=eps)


def _score_factor(rope: RopeConfig) -> float:
    """Return the factor of yarn's `mscale_all_dim` on queries and keys, of which only some columns are rotated."""
    if rope.kind == "default" or not rope.mscale_all_dim or (rope.factor or 1) <= 1:
        return 1.0
    return 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0


FAMILY = Family({"DeepseekV3ForCausalLM": "deepseek_v3"}, config, Decoder, partial(weight_rules, names=NAMES))
