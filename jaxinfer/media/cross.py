"""Prompts of models with cross-attention: encoder inputs, and the tokens that the decoder starts with."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxinfer.media.inputs import CrossInputs, EncoderInput


class PromptForms(NamedTuple):
    """Forms of prompts that a model accepts."""

    media: bool = False
    """Whether prompts may have "multi_modal_data"."""
    encoder: bool = False
    """Whether prompts may have "encoder_prompt" and "decoder_prompt"; a plain prompt is the encoder's."""
    promptless: bool = False
    """Whether "multi_modal_data" may be the whole prompt."""
    options: tuple[str, ...] = ()
    """Additional keys that a prompt's dict may have."""


@runtime_checkable
class ParsedPrompt(Protocol):
    """A parsed prompt (`inputs.prompts.Prompt`)."""

    text: str | None
    token_ids: tuple[int, ...] | None
    media: Mapping[str, Any] | None
    special_tokens: bool
    options: Mapping[str, Any]

    @property
    def encoder(self) -> "ParsedPrompt | None":
        """The encoder's own prompt."""
        ...


class CrossPrompt(NamedTuple):
    """Token ids and encoder inputs of a prompt."""

    token_ids: list[int]
    """Token ids of the decoder, with its start token."""
    cross: CrossInputs | None
    """Encoder inputs; None if there are none to attend to."""
    rule: int = 0
    """Parameter of the model's token rule (`models.base.CrossSource.rule`) for this prompt; 0 if it does not apply."""
    extra_tokens: int = 0
    """Number of tokens that the rule forces, in addition to the requested ones."""


class ReaderSources(NamedTuple):
    """Objects that a prompt reader is constructed from."""

    config: Any
    """Configuration of the module (`models.base.ModelConfig`)."""
    hf: Mapping[str, Any]
    """config.json; empty for a module passed by the user."""
    generation: Mapping[str, Any]
    """generation_config.json; empty for a module passed by the user."""
    tokenizer: Any
    """transformers tokenizer, or None."""
    directory: Path | None
    """Folder of the checkpoint, or None."""

    def lookup(self, name: str) -> Any:
        """Return a value of generation_config.json, else of config.json, as in transformers; None if in neither."""
        value = self.generation.get(name)
        return self.hf.get(name) if value is None else value


@runtime_checkable
class CrossReader(Protocol):
    """Reads the prompts of a model; created by its family (`models.base.Family.reader`)."""

    forms: PromptForms
    modality: str
    """Modality of the encoder inputs: "text", or the key in `multi_modal_data`."""
    marker: str | None
    """Marker of an input in the text of a chat; None if chats have none."""

    def read(self, prompt: ParsedPrompt, index: int, encode: Callable[[str, bool], list[int]]) -> CrossPrompt:
        """Read prompt number `index`.

        Token ids and lengths are checked against the model's limits elsewhere.

        Args:
            prompt: the parsed prompt.
            index: index for messages.
            encode: tokenizes a text, with or without special tokens.

        Raises:
            TypeError, ValueError: the prompt has something the model does not support; names the prompt's index.
        """
        ...


class TextReader:
    """Reads text prompts for an encoder and a decoder.

    The decoder's tokens are `decoder_start_token_id`, followed by the given token ids, unless they start with it; or
    followed by the text, after `forced_bos_token_id`.
    """

    forms = PromptForms(encoder=True)
    modality = "text"
    marker: str | None = None

    def __init__(self, sources: ReaderSources):
        start = sources.lookup("decoder_start_token_id")
        self._start = sources.lookup("bos_token_id") if start is None else start
        self._first = sources.lookup("forced_bos_token_id")

    def read(self, prompt: ParsedPrompt, index: int, encode: Callable[[str, bool], list[int]]) -> CrossPrompt:
        """Read prompt number `index`; see `CrossReader.read`."""
        prompted = prompt.encoder
        if prompted is None:
            raise ValueError(f"prompt {index} has no 'encoder_prompt'; pass one.")
        read = list(encode(prompted.text, True) if prompted.token_ids is None else prompted.token_ids)
        if not read:
            raise ValueError(f"prompt {index}: the encoder prompt has no tokens.")
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
        values = np.array(read, np.int64).clip(-1, 2**31 - 1).astype(np.int32)  # out-of-range ids are refused later
        return CrossPrompt(ids, CrossInputs((EncoderInput("text", values, 1),)))
