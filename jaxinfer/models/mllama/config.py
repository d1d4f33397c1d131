"""Llama 3.2 Vision's config.json (`MllamaForConditionalGeneration`)."""

import re
from dataclasses import dataclass, replace
from typing import Any

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.errors import ConfigError
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.vision import VisionConfig
from jaxinfer.models.base import CrossSource
from jaxinfer.models.decoder_config import CompositeConfig, DecoderConfig
from jaxinfer.models.decoder_reader import read_config as read_decoder_config
from jaxinfer.models.internvl.config import side
from jaxinfer.models.mllama.vision import MllamaVisionConfig

RATIOS = ([1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1])
TAPS, CROSS_LAYERS = (3, 7, 15, 23, 30), (3, 8, 13, 18, 23, 28, 33, 38)
"""Defaults of `intermediate_layers_indices` and `cross_attention_layers` in config.json."""
EXTRA_TOKENS = 8
"""Number of embedding rows beyond the head's; the image token is the first."""
MOST_IMAGES = 8
"""Maximum number of images in a prompt. The cache always has room for them, which takes 1.7 GB for Llama 3.2 11B in
bfloat16.
"""
TAPS_AFTER = (4, 56)
"""Version of transformers from which on `intermediate_layers_indices` names layers whose outputs are used. Earlier,
and in the original, it named layers whose inputs are (docs/decisions.md).
"""


@dataclass(frozen=True)
class MllamaConfig(CompositeConfig):
    """Configuration of vision tower and decoder."""

    vision: MllamaVisionConfig
    text: DecoderConfig
    cross_layers: frozenset[int]
    """Layers with cross-attention to images and no self-attention."""
    image_token: int

    @property
    def cross(self) -> CrossSource:
        """Images, each as the maximum number of tiles."""
        vision = self.vision
        layer = vision.layer
        shape = (vision.tiles, layer.channels, layer.image_size, layer.image_size)
        rows = vision.tiles * vision.patches
        return CrossSource("image", shape, rows, MOST_IMAGES * rows, numbers=1, beyond=EXTRA_TOKENS)

    @property
    def features(self) -> None:
        """Encoder inputs that replace token embeddings: none."""
        return None


def read_config(reader: ConfigReader) -> MllamaConfig:
    """Read the configuration.

    Raises:
        ConfigError: sizes do not fit each other, or an option is not supported.
    """
    text = reader.part("text_config")
    text.default_theta = 500_000.0
    text.defaults_if_absent(num_key_value_heads=8)
    text.defaults(
        vocab_size=128_256,
        hidden_size=4096,
        num_hidden_layers=40,
        num_attention_heads=32,
        intermediate_size=14_336,
        rms_norm_eps=1e-5,
        max_position_embeddings=131_072,
    )
    layers = tuple(text.get_list("cross_attention_layers", list(CROSS_LAYERS)))
    config = read_decoder_config(text)
    _indices("cross_attention_layers", layers, 0, config.num_layers)
    # The embedding has more rows than the head: transformers ties nothing, whatever tie_word_embeddings says.
    reader.skip("tie_word_embeddings")
    config = replace(config, tied=False)
    vision = _vision(reader.part("vision_config"), _names_outputs(reader))
    reader.require("image_token_id", reader.config.get("image_token_index"))
    token = reader.get_int("image_token_index", config.vocab_size, least=0)
    if token >= config.vocab_size + EXTRA_TOKENS:
        raise ConfigError(
            f"config.json: image_token_index is {token}; it must be smaller than the embedding's {config.vocab_size} + "
            f"{EXTRA_TOKENS} rows"
        )
    return MllamaConfig(vision, config, frozenset(layers), token)


def _vision(reader: ConfigReader, names_outputs: bool) -> MllamaVisionConfig:
    reader.defaults(image_size=448, patch_size=14, vision_output_dim=7680)
    reader.skip("tie_word_embeddings")  # written by a full dump; the tower has no head
    width, heads = reader.get_int("hidden_size", 1280), reader.get_int("attention_heads", 16)
    image, patch = side(reader, "image_size"), side(reader, "patch_size")
    reader.divide("hidden_size", width, "attention_heads", heads)
    reader.divide("image_size", image, "patch_size", patch)
    activation = reader.get_choice("hidden_act", "gelu", ACTIVATIONS)
    layers, tiles = reader.get_int("num_hidden_layers", 32), reader.get_int("max_num_tiles", 4)
    taps = tuple(reader.get_list("intermediate_layers_indices", list(TAPS)))
    _indices("intermediate_layers_indices", taps, 0, layers)
    layer = VisionConfig(
        width=width,
        layers=layers,
        heads=heads,
        ffn=reader.get_int("intermediate_size", 5120),
        activation=activation,
        channels=reader.get_int("num_channels", 3),
        image_size=image,
        patch_size=patch,
        norm="layer_norm",
        norm_eps=reader.get_float("norm_eps", 1e-5, above=0),
        out_bias=False,
    )
    config = MllamaVisionConfig(
        layer,
        reader.get_int("num_global_layers", 8),
        _ratios(reader, tiles),
        tiles,
        tuple(tap if names_outputs else tap - 1 for tap in taps),
    )
    made = reader.get_int("vision_output_dim", config.width)
    if made != config.width:
        raise ConfigError(
            f"{reader.family}: vision_output_dim is {made}, but it must be hidden_size * (1 + number of "
            f"intermediate_layers_indices) = {width} * (1 + {len(taps)}) = {config.width}"
        )
    return config


def _names_outputs(reader: ConfigReader) -> bool:
    """Return whether `intermediate_layers_indices` names outputs, by the file's transformers version.

    Without a version it is read as written by the newest.
    """
    found = re.match(r"(\d+)\.(\d+)", str(reader.config.get("transformers_version") or ""))
    return found is None or tuple(map(int, found.groups())) >= TAPS_AFTER


def _ratios(reader: ConfigReader, tiles: int) -> tuple[tuple[int, int], ...]:
    given = reader.get("supported_aspect_ratios", list(RATIOS))
    fits = (
        isinstance(given, list)
        and bool(given)
        and all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(x) is int and x > 0 for x in pair)
            and pair[0] * pair[1] <= tiles
            for pair in given
        )
    )
    if not fits:
        raise ConfigError(
            f"{reader.family}: supported_aspect_ratios={str(given)[:200]} must be pairs of positive integers "
            f"whose product is at most max_num_tiles = {tiles}"
        )
    return tuple((down, across) for down, across in given)


def _indices(name: str, values: tuple[Any, ...], least: int, most: int) -> None:
    if len(values) > most or any(type(value) is not int or not least <= value < most for value in values):
        raise ConfigError(
            f"config.json: {name} is {list(values)[:50]}; each must be a whole number from {least} to {most - 1}"
        )
