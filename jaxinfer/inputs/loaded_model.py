"""Loaded model: weights, tokenizer, media readers and generation defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.inputs.tokenizer import id_bound
from jaxinfer.media import CrossReader, MediaReader
from jaxinfer.models.base import LanguageModel
from jaxinfer.sampling_params import SamplingParams


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights loaded, its tokenizer, and the settings of its checkpoint."""

    module: LanguageModel
    tokenizer: Any
    """transformers tokenizer; None if only token ids are served."""
    media: MediaReader | None
    """Reader of media that take the places of tokens, such as images; None if the model takes no media."""
    cross: CrossReader | None
    """Reader of the prompts of a model with cross-attention; None for other models."""
    default_params: SamplingParams
    eos_token_ids: tuple[int, ...]
    forced: Mapping[str, int | None] = field(default_factory=dict)
    """Forced first and last output tokens: `SamplingParams` field name -> token id."""
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json as plain JSON; empty if the model has no such file."""
    draft: LanguageModel | None = None
    """Draft model of speculative decoding."""

    @property
    def tokenizer_len(self) -> int | None:
        """Highest token id of the tokenizer plus 1.

        None without a tokenizer, or if the model's decoding rule produces tokens that the tokenizer may lack (the
        timestamps of older Whisper tokenizers).
        """
        cross = self.module.config.cross
        if self.tokenizer is None or (cross is not None and cross.rule is not None):
            return None
        return id_bound(self.tokenizer)
