"""Gemma 2 (`Gemma2ForCausalLM`, arXiv:2408.00118): alternating sliding windows, pre- and post-norms, softcaps."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.layers.norms import Scaling
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import AFTER, BEFORE, FULL, SLIDING, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds, read_config, window_of

SCALING = Scaling(offset=1.0, wide=True)
"""Scaling of Gemma's norms."""


def gemma(reader: ConfigReader, kinds: Sequence[str], **more: Any) -> DecoderConfig:
    """Read the attributes that Gemma 2 and 3 share; `more` are arguments of `decoder_reader.read_config`.

    `hidden_act` is present in old files and was never used.
    """
    reader.skip("hidden_act", "sliding_window_size")
    bias = reader.get_bool("attention_bias", False)
    shared = read_config(
        reader,
        qkv_bias=bias,
        out_bias=bias,
        window=window_of(reader),
        kinds=layer_kinds(reader, kinds),
        activation="hidden_activation",
        **more,
    )
    scale = reader.get_float("query_pre_attn_scalar", above=0) ** -0.5
    return replace(
        shared,
        attention=replace(shared.attention, scale=scale, norm_scaling=SCALING),
        norms=(BEFORE, AFTER),
        norm_scaling=SCALING,
        embedding_scale=shared.attention.width**0.5,
        logit_softcap=reader.get_float("final_logit_softcapping", None, above=0),
    )


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; the first layer slides, and both softcaps may be null."""
    reader.defaults_if_absent(
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096, num_key_value_heads=4
    )
    reader.defaults(
        query_pre_attn_scalar=256,
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        head_dim=256,
        max_position_embeddings=8192,
    )
    layers = reader.get_int("num_hidden_layers")
    made = gemma(reader, [(SLIDING, FULL)[number % 2] for number in range(layers)])
    softcap = reader.get_float("attn_logit_softcapping", None, above=0)
    return replace(made, attention=replace(made.attention, softcap=softcap))


FAMILY = Family({"Gemma2ForCausalLM": "gemma2"}, config, Decoder, weight_rules, float16=False)
