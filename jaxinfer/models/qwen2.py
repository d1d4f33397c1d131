"""Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`): biases on q, k and v (arXiv:2407.10671)."""

from typing import Any

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, SLIDING, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds, read_config, window_of


def windows(reader: ConfigReader) -> dict[str, Any]:
    """Read Qwen's sliding window as arguments of `decoder_reader.read_config`.

    It applies only if `use_sliding_window` is true, and then to the layers named by `layer_types`, or else to those
    from `max_window_layers` on.
    """
    window, layers = window_of(reader), reader.get_int("num_hidden_layers")
    first = min(reader.get_int("max_window_layers", 28, least=0), layers)
    if not reader.get_bool("use_sliding_window", False) or window is None:
        window, first = None, layers
    kinds = layer_kinds(reader, [FULL] * first + [SLIDING] * (layers - first))
    return {"window": window, "kinds": kinds}


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; q, k and v always have biases and o never, whatever the file says."""
    reader.defaults_if_absent(num_key_value_heads=32)
    reader.defaults(max_position_embeddings=32_768)
    reader.skip("attention_bias", "qkv_bias")
    return read_config(reader, qkv_bias=True, **windows(reader))


FAMILY = Family({"Qwen2ForCausalLM": "qwen2"}, config, Decoder, weight_rules)
