"""Mistral (`MistralForCausalLM`): Llama without biases; early versions have a sliding window (arXiv:2310.06825)."""

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, SLIDING, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds, read_config, window_of


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; a window applies to all layers unless `layer_types` says otherwise."""
    reader.defaults_if_absent(sliding_window=4096, num_key_value_heads=8)
    reader.defaults(max_position_embeddings=131_072)
    window = window_of(reader)
    default = [SLIDING if window else FULL] * reader.get_int("num_hidden_layers")
    kinds = layer_kinds(reader, default)
    reader.skip("max_window_layers")
    reader.require("use_sliding_window", *([True] if SLIDING in kinds else [True, False]))
    return read_config(reader, window=window, kinds=kinds)


FAMILY = Family({"MistralForCausalLM": "mistral"}, config, Decoder, weight_rules)
