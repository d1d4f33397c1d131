"""Parse prompts from any of the accepted forms and check them; errors name the prompt by index."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxinfer._utils.checks import describe, show_int
from jaxinfer.media import PromptForms

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_ADAPTER = "adapter"
_MEDIA = "multi_modal_data"
_PAIR = ("encoder_prompt", "decoder_prompt")
_ENCODER, _DECODER = "encoder", "decoder"
_NOT_TEXT = (_MEDIA, "multi_modal_uuids", "mm_processor_kwargs", "prompt_embeds", *_PAIR)


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt. At least one of `text` and `token_ids` is set; if both are, `token_ids` are used.

    For an encoder-decoder model of text, this is the decoder's prompt, which may be empty.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    cache_salt: str | None = None
    """Salt of the prefix cache: a prompt shares cached blocks only with prompts of the same salt."""
    media: Mapping[str, Any] | None = field(default=None, compare=False)
    """The user's `multi_modal_data`, unchanged."""
    special_tokens: bool = True
    """Whether the tokenizer adds its special tokens to the text."""
    encoder: Prompt | None = None
    """Prompt of the encoder; None for models whose encoder takes no prompt."""
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Model-specific keys of the prompt's dict (`PromptForms.options`), unchanged."""
    adapter: str | None = None
    """Name of the LoRA adapter of the prompt and its output; None for the model as it is."""

    @property
    def encoder_text(self) -> str | None:
        """Text of the encoder's prompt; None if the encoder takes no prompt or got token ids alone."""
        return None if self.encoder is None else self.encoder.text


def parse_prompts(prompts: Any, *, max_chars: int | None = None, forms: PromptForms = PromptForms()) -> list[Prompt]:
    """Parse prompts in any of the accepted forms.

    A prompt is a string, a list of token ids, or a dict with "prompt" or "prompt_token_ids" (or both: the ids are used
    and the text is returned in the output) and optionally "cache_salt", "adapter" and "multi_modal_data". `prompts` is
    one prompt or a list or tuple of prompts; a list of numbers is one prompt of token ids, an empty list is no prompt.

    For an encoder-decoder model of text, such a prompt is the encoder's. To set both prompts, pass a dict with
    "encoder_prompt" and "decoder_prompt", each a string, token ids, or a dict with "prompt" or "prompt_token_ids"; the
    decoder's may be None or omitted.

    Args:
        prompts: the user's prompts.
        max_chars: maximum length of a text, in characters (`max_prompt_chars`); None for no limit.
        forms: prompt forms that the model accepts; the contents of "multi_modal_data" are checked in `media`.

    Returns:
        The parsed prompts, in order.

    Raises:
        TypeError: `prompts` or one of its fields has an unsupported type.
        ValueError: a prompt is empty or too long, a text is not Unicode, or a key is unknown or unsupported by the
            model. Every error names the index of the prompt.
    """
    if isinstance(prompts, (str, Mapping)) or _is_numbers(prompts):
        prompts = [prompts]
    elif not is_sequence(prompts):
        raise TypeError(f"prompts must be a string, token ids, a dict, or a list of these, got {describe(prompts)}.")
    return [_parse(prompt, index, max_chars, forms) for index, prompt in enumerate(prompts)]


def check_token_ids(token_ids: Sequence[int], vocab_size: int, index: int, what: str = "prompt") -> None:
    """Check that all token ids are in the vocabulary.

    Raises:
        ValueError: an id is outside; the error names the prompt's index, the id, its position and the vocabulary size.
    """
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    position, token = next((at, token) for at, token in enumerate(token_ids) if not 0 <= token < vocab_size)
    raise ValueError(
        f"{what} {index}: token id {show_int(token)} at position {position} is out of "
        f"vocabulary: ids run from 0 to {vocab_size - 1} (vocab_size={vocab_size})."
    )


def check_prompt_length(length: int, max_model_len: int, index: int, of_images: int = 0, length_hint: str = "") -> None:
    """Check that a prompt leaves room for at least one new token.

    Args:
        length: tokens of the prompt, image tokens included.
        max_model_len: maximum tokens of a sequence.
        index: index of the prompt in its call.
        of_images: number of image tokens in the prompt.
        length_hint: error text that says what limits `max_model_len` and how to raise it (`ModelLimits.length_hint`).

    Raises:
        ValueError: the prompt is too long; the error names the prompt's index, both lengths and the remedy.
    """
    if length < max_model_len:
        return
    requested = "" if length > max_model_len else " plus the number of requested output tokens (at least 1)"
    images = f", {of_images} of it images" if of_images else ""
    shorten = "Pass fewer or smaller images" if of_images else "Shorten the prompt"
    raise ValueError(
        f"prompt {index}: The decoder prompt (length {length}{images}){requested} is longer than the "
        f"maximum model length of {max_model_len}. {shorten}{length_hint}."
    )


def max_prompt_chars(longest_token: int, max_model_len: int) -> int:
    """Return an upper bound on the characters of `max_model_len` tokens, to reject long texts before tokenising them.

    Args:
        longest_token: characters of the vocabulary's longest token. At least 64 are assumed, since tokenizers may drop
            or merge characters (spaces, accents) before they look tokens up.
        max_model_len: maximum tokens of a sequence.
    """
    return max(longest_token, 64) * max_model_len


def is_sequence(value: Any) -> bool:
    """Return whether a value is a list, a tuple or an array."""
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim >= 1)


def _is_numbers(value: Any) -> bool:
    return is_sequence(value) and len(value) > 0 and all(isinstance(item, numbers.Number) for item in value)


def _parse(prompt: Any, index: int, max_chars: int | None, forms: PromptForms) -> Prompt:
    if forms.encoder:
        return _parse_pair(prompt, index, max_chars)
    if isinstance(prompt, str):
        return Prompt(text=_text(prompt, index, max_chars))
    if is_sequence(prompt):
        return Prompt(token_ids=_token_ids(prompt, index))
    if isinstance(prompt, Mapping):
        return _parse_dict(prompt, index, max_chars, forms, adapted=True)
    raise TypeError(f"prompt {index} must be a string, a list of token ids or a dict, got {describe(prompt)}.")


def _parse_pair(prompt: Any, index: int, max_chars: int | None) -> Prompt:
    """Parse the prompt of an encoder-decoder model of text into the encoder's and the decoder's prompt."""
    if not isinstance(prompt, Mapping) or not any(key in prompt for key in _PAIR):
        whole = _parse_side(prompt, index, max_chars, _ENCODER, f", or {_PAIR[0]} and {_PAIR[1]}")
        return Prompt(cache_salt=whole.cache_salt, encoder=replace(whole, cache_salt=None))
    for key in prompt:
        if key not in (*_PAIR, "cache_salt"):
            raise ValueError(
                f"prompt {index}: unknown key {describe(key)}; beside {_PAIR[0]!r} the keys are {_PAIR[1]!r}, "
                "cache_salt."
            )
    if prompt.get(_PAIR[0]) is None:
        found = f"a dict with {_PAIR[1]!r}" if prompt.get(_PAIR[1]) is not None else "a dict of an encoder-decoder"
        raise ValueError(f"prompt {index}: {found} needs {_PAIR[0]!r}: a string, token ids or a dict of either.")
    encoder = _parse_side(prompt[_PAIR[0]], index, max_chars, _ENCODER)
    given = prompt.get(_PAIR[1])
    decoder = Prompt() if given is None else _parse_side(given, index, max_chars, _DECODER)
    salts = [prompt.get("cache_salt"), encoder.cache_salt, decoder.cache_salt]
    salt = next((one for one in salts if one is not None), None)
    return replace(
        decoder, encoder=replace(encoder, cache_salt=None), cache_salt=None if salt is None else _salt(salt, index)
    )


def _parse_side(prompt: Any, index: int, max_chars: int | None, side: str, others: str = "") -> Prompt:
    """Parse the encoder's or the decoder's prompt; `others`: error text with alternative keys of a dict."""
    if isinstance(prompt, str):
        return Prompt(text=_text(prompt, index, max_chars, side))
    if is_sequence(prompt):
        return Prompt(token_ids=_token_ids(prompt, index, side))
    if isinstance(prompt, Mapping):
        return _parse_dict(prompt, index, max_chars, PromptForms(), side, others)
    raise TypeError(
        f"prompt {index}: the {side} prompt must be a string, a list of token ids or a dict, got {describe(prompt)}."
    )


def _parse_dict(
    prompt: Mapping[Any, Any],
    index: int,
    max_chars: int | None,
    forms: PromptForms,
    side: str = _DECODER,
    others: str = "",
    *,
    adapted: bool = False,
) -> Prompt:
    """Parse a dict; `adapted`: whether it may name an adapter, which is that of the decoder."""
    keys = (*_KEYS, *([_ADAPTER] if adapted else []), *([_MEDIA] if forms.media else []), *forms.options)
    for key in prompt:
        if key in keys:
            continue
        if key in _NOT_TEXT:
            takes = f"text and {_MEDIA}" if forms.media else "text only"
            raise ValueError(f"prompt {index}: this model takes {takes}, leave out {key!r}.")
        raise ValueError(f"prompt {index}: unknown key {describe(key)}; the keys are {', '.join(keys)}{others}.")
    data = prompt.get(_MEDIA)
    if data is not None and not isinstance(data, Mapping):
        raise TypeError(f"prompt {index}: {_MEDIA!r} must be a dict such as {{'image': ...}}, got {describe(data)}.")
    text, ids, salt = (prompt.get(key) for key in _KEYS)
    if text is None and ids is None and not (forms.promptless and data):
        raise ValueError(f"prompt {index}: a dict needs 'prompt' or 'prompt_token_ids'{others}.")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"prompt {index}: 'prompt' must be a string, got {describe(text)}.")
    if ids is not None and not is_sequence(ids):
        raise TypeError(f"prompt {index}: 'prompt_token_ids' must be a list of token ids, got {describe(ids)}.")
    return Prompt(
        text=None if text is None or (ids is not None and text == "") else _text(text, index, max_chars, side),
        token_ids=None if ids is None else _token_ids(ids, index, side),
        cache_salt=None if salt is None else _salt(salt, index),
        media=data,
        options={name: prompt[name] for name in forms.options if prompt.get(name) is not None},
        adapter=adapter_name(prompt.get(_ADAPTER), f"prompt {index}"),
    )


def adapter_name(name: Any, where: str) -> str | None:
    """Return the name of an adapter, or None for none.

    Raises:
        TypeError: it is no string.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{where}: adapter must be the name of an adapter, got {describe(name)}")
    return name


def with_adapter(prompts: Sequence[Prompt], adapter: Any) -> list[Prompt]:
    """Return prompts with an adapter where they name none.

    Args:
        prompts: parsed prompts.
        adapter: a name for all of them, or a list with one for each; None for none.

    Raises:
        TypeError, ValueError: a name is no string, or there are not as many as prompts.
    """
    each = list(adapter) if isinstance(adapter, list | tuple) else [adapter] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(f"adapter has {len(each)} entries for {len(prompts)} prompts: pass one for each")
    names = [adapter_name(one, f"prompt {index}") for index, one in enumerate(each)]
    return [
        prompt if prompt.adapter is not None or name is None else replace(prompt, adapter=name)
        for prompt, name in zip(prompts, names, strict=True)
    ]


def _text(text: str, index: int, max_chars: int | None, side: str = _DECODER) -> str:
    if not text:
        raise ValueError(f"prompt {index}: The {side} prompt cannot be empty.")
    if max_chars is not None and len(text) > max_chars:
        raise ValueError(
            f"prompt {index}: the text has {len(text)} characters, more than the {max_chars} "
            "that the maximum model length can hold. Shorten the prompt."
        )
    check_unicode(text, f"prompt {index}")
    return text


def check_unicode(text: str, where: str) -> None:
    """Reject lone surrogates: they have no UTF-8 encoding, so tokenizers fail on them. All else is valid, even NUL."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise ValueError(
            f"{where}: character {error.start} is the lone surrogate {code}, which is not text. "
            "Decode your bytes with errors='replace'."
        ) from None


def _token_ids(ids: Any, index: int, side: str = _DECODER) -> tuple[int, ...]:
    if isinstance(ids, np.ndarray):
        ids = ids.tolist()
    if len(ids) == 0:
        raise ValueError(f"prompt {index}: The {side} prompt cannot be empty.")
    if set(map(type, ids)) == {int}:
        return tuple(ids)
    for position, token in enumerate(ids):
        if isinstance(token, (bool, np.bool_)) or not isinstance(token, (int, np.integer)):
            raise TypeError(f"prompt {index}: token id {describe(token)} at position {position} must be an integer.")
    return tuple(int(token) for token in ids)


def _salt(salt: Any, index: int) -> str:
    if not isinstance(salt, str):
        raise TypeError(f"prompt {index}: cache_salt must be a string, got {describe(salt)}.")
    if not salt:
        raise ValueError(f"prompt {index}: cache_salt cannot be empty; leave it out to share with all.")
    check_unicode(salt, f"prompt {index}: cache_salt")
    return salt
