"""Prompts of models with cross-attention: what their encoder reads, and the tokens their decoder starts with."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxinfer.media.inputs import CrossInputs, EncoderInput


class Forms(NamedTuple):
    """Which forms the prompts of a model may have."""

    media: bool = False
    """With "multi_modal_data"."""
    encoder: bool = False
    """With "encoder_prompt" and "decoder_prompt"; what stands alone is the encoder's."""
    promptless: bool = False
    """"multi_modal_data" may be all there is."""
    options: tuple[str, ...] = ()
    """Further keys that a dict may have."""


@runtime_checkable
class Asked(Protocol):
    """A prompt as it was parsed (`text.Prompt`)."""

    text: str | None
    token_ids: tuple[int, ...] | None
    media: Mapping[str, Any] | None
    special_tokens: bool
    options: Mapping[str, Any]

    @property
    def encoder(self) -> "Asked | None":
        """The encoder's own prompt."""
        ...


class CrossPrompt(NamedTuple):
    """A prompt, read."""

    token_ids: list[int]
    """The decoder's, its start token and all."""
    cross: CrossInputs | None
    """None: the decoder's tokens have nothing to attend to."""
    rule: int = 0
    """What the model's rule (`models.base.CrossSource.rule`) is told of this prompt; 0: it does not hold."""
    extra_tokens: int = 0
    """Tokens that the rule has made beside those that the user asked for."""


class ReaderSources(NamedTuple):
    """What a reader is made from."""

    config: Any
    """Of the module (`models.base.ModelConfig`)."""
    hf: Mapping[str, Any]
    """config.json; empty for a module that came as such."""
    generation: Mapping[str, Any]
    """generation_config.json; likewise."""
    tokenizer: Any
    """Of transformers, or None."""
    directory: Path | None
    """Of the checkpoint."""

    def said(self, name: str) -> Any:
        """What generation_config.json says, or else config.json, as in transformers; None: neither does."""
        value = self.generation.get(name)
        return self.hf.get(name) if value is None else value


@runtime_checkable
class CrossReader(Protocol):
    """Reads the prompts of one model; its family makes it (`models.base.Family.reader`)."""

    forms: Forms
    modality: str
    """What it reads: "text", or the name under `multi_modal_data`."""
    marker: str | None
    """What stands for such an input in a chat's text; None: chats have none."""

    def read(self, prompt: Asked, index: int, encode: Callable[[str, bool], list[int]]) -> CrossPrompt:
        """Prompt number `index`; `encode`: a text's token ids, with or without the tokenizer's special tokens.

        Token ids and lengths are held against the model's limits elsewhere.

        Raises:
            TypeError, ValueError: something that this model does not read; names the prompt's index.
        """
        ...


class TextReader:
    """Text for the encoder, and for the decoder what it is to begin with.

    The decoder starts with `decoder_start_token_id`. Behind it stand the token ids that were given, if they do not
    begin with it themselves; or a text, after the token that the model is made to begin with (`forced_bos_token_id`).
    """

    forms = Forms(encoder=True)
    modality = "text"
    marker: str | None = None

    def __init__(self, sources: ReaderSources):
        start = sources.said("decoder_start_token_id")
        self._start = sources.said("bos_token_id") if start is None else start
        self._first = sources.said("forced_bos_token_id")

    def read(self, prompt: Asked, index: int, encode: Callable[[str, bool], list[int]]) -> CrossPrompt:
        """As `CrossReader`."""
        asked = prompt.encoder
        if asked is None:
            raise ValueError(f"prompt {index}: there is no 'encoder_prompt'.")
        read = list(encode(asked.text, True) if asked.token_ids is None else asked.token_ids)
        if not read:
            raise ValueError(f"prompt {index}: The encoder prompt has no tokens.")
        ids = list(prompt.token_ids or ())
        if prompt.token_ids is None and prompt.text:
            ids = [*([] if self._first is None else [self._first]), *encode(prompt.text, False)]
        if self._start is not None and ids[:1] != [self._start]:
            ids = [self._start, *ids]
        if not ids:
            raise ValueError(
                f"prompt {index}: neither generation_config.json nor config.json has a decoder_start_token_id, so the "
                "'decoder_prompt' must have the token that the decoder starts with."
            )
        values = np.array(read, np.int64).clip(-1, 2**31 - 1).astype(np.int32)  # ids beyond are refused later
        return CrossPrompt(ids, CrossInputs((EncoderInput("text", values, 1),)))
