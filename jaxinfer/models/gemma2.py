"""Gemma 2 (`Gemma2ForCausalLM`): windows in every other layer, norms on both sides, capped scores (arXiv:2408.00118)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.layers.norms import Scaling
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import AFTER, BEFORE, FULL, SLIDING, DecoderConfig, layer_kinds, read_config

SCALING = Scaling(offset=1.0, wide=True)
"""Of Gemma's norms."""


def gemma(reader: ConfigReader, kinds: Sequence[str], **more: Any) -> DecoderConfig:
    """What Gemma 2 and 3 have in common; `more`: of `models.decoder_config.read_config`.

    `hidden_act` is in old files and was never used; `cache_implementation` is about transformers' own cache.
    """
    reader.skip("hidden_act", "cache_implementation", "sliding_window_size")
    bias = reader.get_bool("attention_bias", False)
    shared = read_config(
        reader, qkv_bias=bias, out_bias=bias, window=reader.get_int("sliding_window", None),
        kinds=layer_kinds(reader, kinds), activation="hidden_activation", **more,
    )  # fmt: skip
    scale = reader.get_float("query_pre_attn_scalar") ** -0.5
    return replace(
        shared, attention=replace(shared.attention, scale=scale, norm_scaling=SCALING), norms=(BEFORE, AFTER),
        norm_scaling=SCALING, embedding_scale=shared.attention.width**0.5,
        logit_softcap=reader.get_float("final_logit_softcapping", None),
    )  # fmt: skip


def config(reader: ConfigReader) -> DecoderConfig:
    """The first layer slides; both caps may be null."""
    reader.defaults(
        query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True, head_dim=256,
    )  # fmt: skip
    layers = reader.get_int("num_hidden_layers")
    made = gemma(reader, [(SLIDING, FULL)[number % 2] for number in range(layers)])
    softcap = reader.get_float("attn_logit_softcapping", None)
    return replace(made, attention=replace(made.attention, softcap=softcap))


FAMILY = Family(config, Decoder, weight_rules)
