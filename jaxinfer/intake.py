"""From what a caller passes to requests: parsed, tokenised, resolved and checked against the model, nothing queued."""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfer.config import EngineConfig
from jaxinfer.engine.request import Request
from jaxinfer.generation_config import from_generation_config
from jaxinfer.media import PlacedInputs
from jaxinfer.opening import Opened
from jaxinfer.resolve import ModelLimits, resolve, spread
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.text import (
    Prompt,
    chat_images,
    check_prompt_length,
    check_token_ids,
    max_prompt_chars,
    parse_prompts,
    render_chat,
)
from jaxinfer.text.tokenizer import longest_token

Params = SamplingParams | Sequence[SamplingParams] | Any | None
"""One for all prompts or one a prompt; a transformers `GenerationConfig` serves as well."""


class Intake:
    """What checks calls for one model.

    `limits`: what the model and its engine allow.
    """

    def __init__(self, opened: Opened, config: EngineConfig, limits: ModelLimits, chat_template: str | None):
        self.limits = limits
        self._opened, self._config, self._chat_template = opened, config, chat_template
        self._numbers = itertools.count()

    def parse(self, prompts: Any) -> list[Prompt]:
        """Prompts in any of the accepted forms; raises as `text.parse_prompts`."""
        opened, most = self._opened, None
        if opened.tokenizer is not None:
            most = max_prompt_chars(longest_token(opened.tokenizer), self.limits.max_model_len)
        return parse_prompts(prompts, max_chars=most, media=opened.media is not None)

    def render(
        self, messages: Any, template: str | None, add_generation_prompt: bool, kwargs: Mapping[str, Any] | None
    ) -> list[Prompt]:
        """Conversations as prompts, their images beside them; raises as `text.render_chat`."""
        tokenizer, media = self._opened.tokenizer, self._opened.media
        if tokenizer is None:
            raise ValueError("chat needs the tokenizer, which was skipped; pass tokenizer=")
        rendered = render_chat(
            tokenizer, messages, chat_template=template or self._chat_template,
            add_generation_prompt=add_generation_prompt, chat_template_kwargs=kwargs,
            image_marker=None if media is None else media.marker,
        )  # fmt: skip
        # The template writes the special tokens itself.
        prompts = [dataclasses.replace(prompt, special_tokens=False) for prompt in self.parse(rendered)]
        if media is None:
            return prompts
        return [
            dataclasses.replace(prompt, media={media.takes.modality: images})
            for prompt, images in zip(prompts, chat_images(messages), strict=True)
        ]

    def chat_params(self, params: Params) -> Params:
        """Without parameters an answer runs to its end."""
        return dataclasses.replace(self._opened.default_params, max_tokens=None) if params is None else params

    def requests(self, prompts: Sequence[Prompt], params: Params) -> list[Request]:
        """One request a prompt.

        Raises:
            TypeError, ValueError: a prompt or parameter that cannot be served; names the prompt's index.
        """
        if params is not None and hasattr(params, "to_dict"):
            params = from_generation_config(params)
        each = spread(self._opened.default_params if params is None else params, len(prompts))
        return [self._request(index, p, own) for index, (p, own) in enumerate(zip(prompts, each, strict=True))]

    def _request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        opened, limits = self._opened, self.limits
        ids, inputs = self._tokens(index, prompt)
        self._check_params(index, params)
        encode = None if opened.tokenizer is None else self._encode
        own = resolve(params, limits, prompt_len=len(ids), encode=encode)
        salts, config = (opened.salt, (prompt.cache_salt or "").encode()), opened.module.config
        number = next(self._numbers)
        return Request(
            id=str(number), prompt=np.array(ids, np.int32), params=own, limit=len(ids) + own.max_tokens,
            salt=b"".join(hashlib.sha256(salt).digest() for salt in salts),
            length_key=config.length_key, recompute_after=config.recompute_after,
            seed=self._seed(number) if own.seed is None else own.seed, inputs=inputs,
        )  # fmt: skip

    def _check_params(self, index: int, params: SamplingParams) -> None:
        if params.stop and self._opened.tokenizer is None:
            raise ValueError(f"prompt {index}: stop strings need a tokenizer; use stop_token_ids")
        most = self._config.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > most:
                raise ValueError(
                    f"prompt {index}: {name} is {getattr(params, name)}, more than max_logprobs = {most} of this LLM; "
                    "ask for fewer, or make it with a larger max_logprobs"
                )

    def _tokens(self, index: int, prompt: Prompt) -> tuple[Sequence[int], PlacedInputs | None]:
        """The token ids of a prompt, checked, and what of them is no text."""
        media, inputs, ids, text = self._opened.media, (), prompt.token_ids, prompt.text
        if ids is None and self._opened.tokenizer is None:
            raise ValueError(f"prompt {index} is text, but there is no tokenizer; pass prompt_token_ids")
        if media is not None:
            inputs = media.read(prompt.media, index)
            text = media.expand(text, inputs, index) if ids is None else text
        ids = self._encode(text, prompt.special_tokens) if ids is None else ids
        if not ids:
            raise ValueError(f"prompt {index} has no tokens")
        check_token_ids(ids, self.limits.vocab_size, index)
        check_prompt_length(len(ids), self.limits.max_model_len, index, sum(one.length for one in inputs))
        return ids, None if media is None else media.place(ids, inputs, index)

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return self._opened.tokenizer.encode(text, add_special_tokens=special)

    def _seed(self, number: int) -> int:
        """Of a request that brings none: from the engine's seed and the request's number."""
        return int(np.random.SeedSequence([self._config.seed, number, 1]).generate_state(1, np.uint64)[0])
