"""EXAONE 4 (`Exaone4ForCausalLM`, arXiv:2507.11407): post-norms, q and k norms; full layers beside sliding ones have no
rope."""

from dataclasses import replace

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.errors import ConfigError
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import AFTER, FULL, SLIDING, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds, read_config, window_of


def config(reader: ConfigReader) -> DecoderConfig:
    """Read the configuration; by default every fourth layer is full, and without a window all are, with rope."""
    reader.defaults_if_absent(sliding_window=4096, num_key_value_heads=32)
    reader.defaults(max_position_embeddings=2048, rms_norm_eps=1e-5)
    window, layers = window_of(reader), reader.get_int("num_hidden_layers")
    pattern = reader.get("sliding_window_pattern", 4)
    if window is not None and not reader.has("layer_types") and (type(pattern) is not int or pattern < 1):
        raise ConfigError(
            f"config.json: sliding_window_pattern is {show(pattern)}; without layer_types it must be a whole number "
            "from 1, the distance of full layers"
        )
    each = pattern if window is not None and type(pattern) is int else 1
    kinds = layer_kinds(reader, [SLIDING if number % each else FULL for number in range(1, layers + 1)])
    shared = read_config(reader, qk_norm=True, window=window, kinds=kinds, local_rope=None if window is None else {})
    shared = replace(shared, norms=(AFTER,))
    return shared if window is None else replace(shared, rope=None)


FAMILY = Family({"Exaone4ForCausalLM": "exaone4"}, config, Decoder, weight_rules)
