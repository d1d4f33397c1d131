"""A model as an `LLM` serves it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.inputs.tokenizer import id_bound
from jaxinfer.media import CrossReader, MediaReader
from jaxinfer.models.base import LanguageModel
from jaxinfer.sampling_params import SamplingParams


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights in place, and what its folder says beside them."""

    module: LanguageModel
    tokenizer: Any
    """None: only token ids are served."""
    media: MediaReader | None
    """What reads the inputs that take the places of tokens; None: the model has none."""
    cross: CrossReader | None
    """What reads the prompts of a model with cross-attention; None: it is none."""
    default_params: SamplingParams
    eos_token_ids: tuple[int, ...]
    salt: bytes
    """Tells its prefixes from those of other models."""
    forced: Mapping[str, int | None] = field(default_factory=dict)
    """The tokens that come first and last, by the names of `SamplingParams`."""
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json as plain JSON; empty where the model has none."""

    @property
    def tokenizer_len(self) -> int | None:
        """One more than the highest id the tokenizer knows; None: none, or a rule makes tokens that it may not know, as
        the timestamps of Whisper's older tokenizers.
        """
        cross = self.module.config.cross
        if self.tokenizer is None or (cross is not None and cross.rule is not None):
            return None
        return id_bound(self.tokenizer)
