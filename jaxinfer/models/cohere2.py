"""Cohere 2, Command R7B and A (`Cohere2ForCausalLM`, arXiv:2504.00698): parallel attention and MLP on one norm.

Full layers have no rope.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.layers.attention import StepContext
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, Layer, weight_rules
from jaxinfer.models.decoder_config import FULL, SLIDING, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds, read_config, window_of


class ParallelLayer(Layer):
    """Parallel layer: `x + attention(norm(x)) + mlp(norm(x))`."""

    @staticmethod
    def norm_names(config: DecoderConfig) -> Mapping[str, str]:
        """Return the layer's single norm."""
        return {"attention_norm": "input_layernorm"}

    def __call__(
        self, x: jax.Array, kv_cache: Any, rope: tuple[jax.Array, jax.Array] | None, step: StepContext
    ) -> tuple[jax.Array, Any]:
        """Map hidden states `[T, M]` to `[T, M]`; also return the layer's new cache."""
        normed = self.attention_norm(x)
        y, kv_cache = self.attend(normed, kv_cache, rope, step)
        return x + y + self.feed_forward(normed, step), kv_cache


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; by default every fourth layer is full, and only sliding layers have a rope."""
    reader.defaults_if_absent(sliding_window=4096)
    reader.defaults(tie_word_embeddings=True, max_position_embeddings=8192)
    one_value = {
        "use_parallel_block": (True,),
        "use_embedding_sharing": (True,),
        "position_embedding_type": ("rope_gptj",),
        "order_of_interleaved_layers": ("local_attn_first",),
        "rotary_pct": (1,),
    }
    for name, values in one_value.items():
        reader.require(name, *values)
    reader.skip("use_parallel_embedding")  # how embeddings are divided over devices
    pattern, layers = reader.get_int("sliding_window_pattern", 4), reader.get_int("num_hidden_layers")
    reader.require("layer_switch", pattern)
    kinds = layer_kinds(reader, [SLIDING if number % pattern else FULL for number in range(1, layers + 1)])
    bias = reader.get_bool("attention_bias", False)
    shared = read_config(
        reader,
        qkv_bias=bias,
        out_bias=bias,
        window=window_of(reader),
        kinds=kinds,
        local_rope={},
        norm_eps=("layer_norm_eps", 1e-5),
    )
    return replace(
        shared,
        attention=replace(shared.attention, interleaved=True),
        rope=None,
        centred_norms=True,
        logit_scale=reader.get_float("logit_scale", 0.0625),
    )


FAMILY = Family(
    {"Cohere2ForCausalLM": "cohere2"},
    config,
    partial(Decoder, block=ParallelLayer),
    partial(weight_rules, block=ParallelLayer),
)
