"""Mistral (`MistralForCausalLM`): Llama without biases, early ones with a sliding window (arXiv:2310.06825)."""

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, DecoderConfig, read_config, weight_rules


def config(reader: ConfigReader) -> DecoderConfig:
    """A window limits the length served until sliding layers are: shorter sequences are not changed by it."""
    return read_config(reader, window=reader.get_int("sliding_window", None))


FAMILY = Family(config, Decoder, weight_rules)
