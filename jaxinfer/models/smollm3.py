"""SmolLM3 (`SmolLM3ForCausalLM`): Llama in which every fourth layer has no rope (NoPE, arXiv:2501.18795)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.errors import ConfigError
from jaxinfer.layers.rope import RopeConfig
from jaxinfer.models.base import Family
from jaxinfer.models.decoder import Decoder, weight_rules
from jaxinfer.models.decoder_config import FULL, SLIDING, DecoderConfig
from jaxinfer.models.decoder_reader import layer_kinds, read_config, window_of


@dataclass(frozen=True)
class SmolLM3Config(DecoderConfig):
    """Llama decoder of which some layers have no positional encoding."""

    nope_layers: tuple[int, ...] = ()
    """Layers without rope."""

    def rope_of(self, layer: int) -> RopeConfig | None:
        """Return the rotary embedding of a layer."""
        return None if layer in self.nope_layers else super().rope_of(layer)


def config(reader: ConfigReader) -> SmolLM3Config:
    """Read the configuration.

    Layers without rope have the sliding window where one is enabled and `layer_types` does not say otherwise.
    """
    reader.default_theta = 2_000_000.0
    reader.defaults_if_absent(num_key_value_heads=4)
    reader.defaults(max_position_embeddings=32_768, tie_word_embeddings=True)
    turned, layers = with_rope(reader), reader.get_int("num_hidden_layers")
    reader.skip("max_window_layers")
    window = window_of(reader)
    window = window if reader.get_bool("use_sliding_window", False) else None
    default = [SLIDING if window and not turned[layer] else FULL for layer in range(layers)]
    bias = reader.get_bool("attention_bias", False)
    shared = read_config(
        reader,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=reader.get_bool("mlp_bias", False),
        window=window,
        kinds=layer_kinds(reader, default),
    )
    values = {field.name: getattr(shared, field.name) for field in fields(shared)}
    return SmolLM3Config(**values, nope_layers=tuple(layer for layer in range(layers) if not turned[layer]))


def with_rope(reader: ConfigReader) -> Sequence[int]:
    """Read `no_rope_layers`: a 1 for each layer with rope and a 0 for each without; by default every fourth has none.

    Raises:
        ConfigError: it is no list of these, or too short.
    """
    layers, each = reader.get_int("num_hidden_layers"), reader.get_int("no_rope_layer_interval", 4)
    turned = reader.get("no_rope_layers", [int(number % each != 0) for number in range(1, layers + 1)])
    if not isinstance(turned, list) or len(turned) < layers or not all(one in (0, 1) for one in turned):
        raise ConfigError(
            f"config.json: no_rope_layers is {show(turned)}; it must be a list of 0 and 1 for each of "
            f"num_hidden_layers = {layers} layers"
        )
    return turned


FAMILY = Family({"SmolLM3ForCausalLM": "smollm3"}, config, Decoder, weight_rules)
