"""Mistral (`MistralForCausalLM`): Llama without biases, early ones with a sliding window (arXiv:2310.06825)."""

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, SLIDING, DecoderConfig, layer_kinds, read_config


def config(reader: ConfigReader) -> DecoderConfig:
    """Where there is a window, all layers have it, unless `layer_types` says which."""
    window = reader.get_int("sliding_window", None)
    default = [SLIDING if window else FULL] * reader.get_int("num_hidden_layers")
    return read_config(reader, window=window, kinds=layer_kinds(reader, default))


FAMILY = Family(config, Decoder, weight_rules)
