"""Whisper's config.json, and the special tokens that generation_config.json names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.hf import ConfigReader, read_generation_config
from jaxinfer.checkpoint.plain_json import show
from jaxinfer.errors import ConfigError
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.models.base import CrossSource
from jaxinfer.models.whisper.tokens import WhisperTokens

STRIDE = 2
"""Frames that become one position of the encoder."""


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
"""What only training and classification read, sizes that are repeated, and a scale that transformers never multiplies
with."""


@dataclass(frozen=True)
class StackConfig:
    """The layers of the encoder, or of the decoder."""

    layers: int
    heads: int
    """H."""
    ffn: int
    """F."""
    positions: int
    """Positions it has."""


@dataclass(frozen=True)
class WhisperConfig:
    """The model, every number that shapes it."""

    vocab_size: int
    """V."""
    width: int
    """M."""
    encoder: StackConfig
    decoder: StackConfig
    bins: int
    """C."""
    activation: str
    rule: WhisperTokens | None
    """What may be said next; None: neither file says which tokens are special."""
    tied: bool = True
    """Whether the head is the embedding."""

    @property
    def cross(self) -> CrossSource:
        """Windows of log-mel frames."""
        rows = self.encoder.positions
        return CrossSource("audio", (self.bins, STRIDE * rows), rows, rows, rule=self.rule)

    @property
    def features(self) -> None:
        """No token's embedding is replaced."""
        return None

    @property
    def num_layers(self) -> int:
        """Of the decoder."""
        return self.decoder.layers

    @property
    def query_group(self) -> int:
        """Every query head has a kv head of its own."""
        return 1

    @property
    def max_length(self) -> int:
        """Tokens of the decoder."""
        return self.decoder.positions

    def length_key(self, prompt_length: int) -> bytes:
        """Positions are learned, whatever the length."""
        return b""

    @property
    def recompute_after(self) -> None:
        """Never."""
        return None


def read_config(reader: ConfigReader) -> WhisperConfig:
    """Read config.json, with what `from_folder` adds to it.

    Raises:
        ConfigError: sizes that do not fit each other, or an option that is not served.
    """
    width = reader.get_int("d_model")

    def stack(name: str, positions: str) -> StackConfig:
        heads = reader.get_int(f"{name}_attention_heads")
        reader.divide("d_model", width, f"{name}_attention_heads", heads)
        return StackConfig(
            reader.get_int(f"{name}_layers"), heads, reader.get_int(f"{name}_ffn_dim"), reader.get_int(positions)
        )

    activation = reader.get_choice("activation_function", "gelu", ACTIVATIONS)
    reader.defaults(max_source_positions=1500, max_target_positions=448)
    said = reader.get("special_tokens", {})
    if not isinstance(said, Mapping):
        raise ConfigError(f"config.json: special_tokens must be an object, got {show(said)}")
    reader.skip(*UNUSED)
    return WhisperConfig(
        reader.get_int("vocab_size"),
        width,
        stack("encoder", "max_source_positions"),
        stack("decoder", "max_target_positions"),
        reader.get_int("num_mel_bins", 80),
        activation,
        WhisperTokens.of(said, reader.config) if said or "decoder_start_token_id" in reader.config else None,
        reader.get_bool("tie_word_embeddings", True),
    )


def from_folder(directory: Path) -> Mapping[str, Any]:
    """Read the special tokens, which generation_config.json names."""
    found = read_generation_config(directory)
    return {"special_tokens": found} if found else {}
