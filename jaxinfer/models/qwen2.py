"""Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`): biases on q, k and v (arXiv:2407.10671)."""

from jaxinfer.checkpoint.hf import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, DecoderConfig, read_config, weight_rules


def sliding_window(reader: ConfigReader) -> int | None:
    """Qwen's window: only where `use_sliding_window` is on, and then from layer `max_window_layers` on."""
    window = reader.get_int("sliding_window", None)
    first = reader.get_int("max_window_layers", 28, least=0)
    reader.skip("layer_types")  # follows from the three others
    used = reader.get_bool("use_sliding_window", False) and first < reader.get_int("num_hidden_layers")
    return window if used else None


def config(reader: ConfigReader) -> DecoderConfig:
    """q, k and v always carry a bias, o never."""
    return read_config(reader, qkv_bias=True, window=sliding_window(reader))


FAMILY = Family(config, Decoder, weight_rules)
