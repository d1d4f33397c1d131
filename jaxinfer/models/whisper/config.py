"""Whisper's config.json, and the special tokens of generation_config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.config_reader import ConfigReader
from jaxinfer.checkpoint.hf import read_generation_config
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.errors import ConfigError
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.models.base import CrossSource
from jaxinfer.models.encoder_decoder import StackConfig, read_stack
from jaxinfer.models.whisper.tokens import WhisperTokens

STRIDE = 2
"""Number of frames per encoder position."""


UNUSED = (
    "apply_spec_augment",
    "classifier_proj_size",
    "mask_feature_length",
    "mask_feature_min_masks",
    "mask_feature_prob",
    "mask_time_length",
    "mask_time_min_masks",
    "mask_time_prob",
    "median_filter_width",
    "num_hidden_layers",
    "scale_embedding",
    "use_weighted_layer_sum",
    "alignment_heads",
)
"""Attributes used only in training and classification, copies of sizes, and a scale that transformers never applies."""


@dataclass(frozen=True)
class WhisperConfig:
    """Shape and options of the model."""

    vocab_size: int
    """V: vocabulary size."""
    width: int
    """M: width of encoder and decoder."""
    encoder: StackConfig
    decoder: StackConfig
    bins: int
    """C: number of mel bins."""
    activation: str
    rule: WhisperTokens | None
    """Token rule; None if no file names the special tokens."""
    tied: bool = True
    """Whether the output head is the token embedding."""
    norm_first: bool = True
    """Whether layers are pre-norm."""
    biases: tuple[str, ...] = ("q", "v")
    """Projections with a bias."""

    @property
    def cross(self) -> CrossSource:
        """Windows of log-mel frames."""
        rows = self.encoder.positions
        return CrossSource("audio", (self.bins, STRIDE * rows), rows, rows, rule=self.rule)

    @property
    def features(self) -> None:
        """Encoder inputs that replace token embeddings: none."""
        return None

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.decoder.layers

    @property
    def query_group(self) -> int:
        """Number of query heads per kv head."""
        return 1

    @property
    def max_length(self) -> int:
        """Maximum length of a decoder sequence."""
        return self.decoder.positions

    def length_key(self, prompt_length: int) -> bytes:
        """Return an empty salt: positions are learned, so keys do not depend on the prompt's length."""
        return b""

    @property
    def recompute_after(self) -> None:
        """Length beyond which rope changes; None, as positions are learned."""
        return None


def read_config(reader: ConfigReader) -> WhisperConfig:
    """Read config.json, extended by `from_folder`.

    Raises:
        ConfigError: sizes do not fit each other, or an option is not supported.
    """
    width = reader.get_int("d_model")

    activation = reader.get_choice("activation_function", "gelu", ACTIVATIONS)
    reader.defaults(max_source_positions=1500, max_target_positions=448)
    special_tokens = reader.get("special_tokens", {})
    if not isinstance(special_tokens, Mapping):
        raise ConfigError(f"config.json: special_tokens must be an object, got {show(special_tokens)}")
    reader.skip(*UNUSED)
    return WhisperConfig(
        reader.get_int("vocab_size"),
        width,
        read_stack(reader, "encoder", width, "max_source_positions"),
        read_stack(reader, "decoder", width, "max_target_positions"),
        reader.get_int("num_mel_bins", 80),
        activation,
        WhisperTokens.of(special_tokens, reader.config)
        if special_tokens or reader.has("decoder_start_token_id")
        else None,
        reader.get_bool("tie_word_embeddings", True),
    )


def from_folder(directory: Path) -> Mapping[str, Any]:
    """Read the special tokens from generation_config.json."""
    found = read_generation_config(directory)
    return {"special_tokens": found} if found else {}
