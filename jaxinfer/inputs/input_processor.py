"""Convert the prompts of a call to engine requests: parse, tokenise and check them against the model."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from jaxinfer._utils.checks import as_token_id, describe
from jaxinfer.adapter import Adapter, find
from jaxinfer.beam_params import BeamParams, beam_sampling
from jaxinfer.config import EngineConfig
from jaxinfer.engine.beam_search.beams import Beams
from jaxinfer.engine.request import Request
from jaxinfer.engine.structured.grammar import Grammar
from jaxinfer.engine.wanted import Wanted
from jaxinfer.inputs.chat import chat_images, render_chat
from jaxinfer.inputs.defaults import ModelLimits, params_per_prompt, resolve
from jaxinfer.inputs.generation_config import from_generation_config
from jaxinfer.inputs.grammars import Grammars
from jaxinfer.inputs.loaded_model import LoadedModel
from jaxinfer.inputs.prompts import (
    Prompt,
    check_prompt_length,
    check_token_ids,
    check_unicode,
    is_sequence,
    max_prompt_chars,
    parse_prompts,
)
from jaxinfer.inputs.tokenizer import encode, encode_batch, encodes_batches, longest_token
from jaxinfer.media import CrossInputs, CrossPrompt, PlacedInputs, PromptForms
from jaxinfer.sampling_params import RequestOutputKind, SamplingParams

SCORED = SamplingParams(
    temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
)
EMBEDDED = dataclasses.replace(SCORED, prompt_logprobs=None)
"""Parameters of requests that end with their prefill."""
PIECE = 1024
"""Prompts tokenised per batch. Limits peak memory: token ids as Python integers take ten times the memory of the int32
arrays that requests keep."""

_Resolved: TypeAlias = dict[tuple[int, int, int], SamplingParams]
"""Cache of resolved parameters within a call: (`id` of the caller's parameters, extra tokens, maximum tokens) ->
result."""

Params = SamplingParams | Sequence[SamplingParams] | Any | None
"""Sampling parameters of a call: one for all prompts, one per prompt, or a transformers `GenerationConfig`."""


class InputProcessor:
    """Input processor of a model: parses prompts, renders chats and makes checked requests.

    `limits`: vocabulary and length limits of the model and its engine; `adapters`: the engine's adapters by name, None
        if it takes none.
    """

    def __init__(
        self,
        opened: LoadedModel,
        config: EngineConfig,
        limits: ModelLimits,
        chat_template: str | None,
        adapters: Mapping[str, Adapter] | None = None,
    ):
        self.limits, self._adapters = limits, adapters
        self._opened, self._config, self._chat_template = opened, config, chat_template
        self._grammars = Grammars(opened.tokenizer, limits.vocab_size, limits.eos_token_ids)
        self._numbers = itertools.count()

    def parse(self, prompts: Any) -> list[Prompt]:
        """Parse prompts in any of the accepted forms; errors are those of `parse_prompts`."""
        opened, most, cross = self._opened, None, self._opened.module.config.cross
        longest = self.limits.max_model_len if cross is None else max(self.limits.max_model_len, cross.longest)
        if opened.tokenizer is not None:
            most = max_prompt_chars(self._longest_token, longest)
        forms = PromptForms(media=opened.media is not None) if opened.cross is None else opened.cross.forms
        return parse_prompts(prompts, max_chars=most, forms=forms)

    @cached_property
    def _longest_token(self) -> int:
        return longest_token(self._opened.tokenizer)

    def render(self, messages: Any, *, chat_template: str | None, **options: Any) -> list[Prompt]:
        """Render conversations to prompts with their images; options and errors are those of `render_chat`."""
        tokenizer, marker, modality = self._opened.tokenizer, *self._marked()
        if tokenizer is None:
            raise ValueError("chat needs the tokenizer, which was skipped; pass tokenizer=")
        template = self._chat_template if chat_template is None else chat_template
        rendered = render_chat(tokenizer, messages, chat_template=template, image_marker=marker, **options)
        # The template has already written the special tokens.
        prompts = [dataclasses.replace(prompt, special_tokens=False) for prompt in self.parse(rendered)]
        if modality is None:
            return prompts
        return [
            dataclasses.replace(prompt, media={modality: images} if images else None)
            for prompt, images in zip(prompts, chat_images(messages), strict=True)
        ]

    def _marked(self) -> tuple[str | None, str | None]:
        """Return the image marker of a chat's text and the modality name of images; None, None for text-only models."""
        media, cross = self._opened.media, self._opened.cross
        if media is not None:
            return media.marker, media.features.modality
        return (None, None) if cross is None or cross.marker is None else (cross.marker, cross.modality)

    def chat_params(self, params: Params) -> Params:
        """Return the parameters of a chat: by default those of the model, without `max_tokens`."""
        return dataclasses.replace(self._opened.default_params, max_tokens=None) if params is None else params

    def beams(
        self, prompts: Sequence[Prompt], params: SamplingParams | None, search: BeamParams, most: int | None
    ) -> list[Request]:
        """Make a beam-search request per prompt, of at most `most` new tokens.

        Errors are those of `requests` and `beam_sampling`, and ValueError if `width` is too large for the vocabulary
        or the engine is deterministic.
        """
        if self._config.deterministic:
            raise ValueError(
                "beam_search is not available with deterministic=True, whose step program does not rank "
                "continuations; make another LLM without it, or sample with n"
            )
        requests = self.requests(prompts, beam_sampling(params, self._opened.default_params, most))
        for index, request in enumerate(requests):
            request.beams = beams = Beams(search, request.limit - len(request.prompt), request.stop_ids)
            known, stops = self.limits.usable, len(request.stop_ids)
            if beams.count > known:
                raise ValueError(
                    f"prompt {index}: width must be at most {known * search.width // beams.count} with {stops} tokens "
                    f"that end a beam, got {search.width}: a step looks at {beams.count} of the {known} tokens of the "
                    "vocabulary."
                )
        return requests

    def requests(self, prompts: Sequence[Prompt], params: Params) -> list[Request]:
        """Make a checked request per prompt, without queueing it.

        Raises:
            TypeError, ValueError: a prompt or parameter is invalid; the error names the prompt's index.
        """
        if params is not None and hasattr(params, "to_dict"):
            params = from_generation_config(params, self._opened.generation_config)
        each = params_per_prompt(self._opened.default_params if params is None else params, len(prompts))
        resolved, made = {}, []
        for start in range(0, len(prompts), PIECE):
            piece = prompts[start : start + PIECE]
            for place, (prompt, ids) in enumerate(zip(piece, self._encode_plain(piece), strict=True), start):
                made.append(self._request(place, prompt, ids, each[place], resolved))
        return made

    def _request(
        self, index: int, prompt: Prompt, encoded: Sequence[int] | None, params: SamplingParams, resolved: _Resolved
    ) -> Request:
        """Make the request of one prompt.

        Args:
            index: index of the prompt in its call, for errors.
            prompt: parsed prompt.
            encoded: token ids of the prompt if already tokenised (`_encode_plain`), else None.
            params: the caller's sampling parameters of this prompt.
            resolved: cache of the call's resolved parameters, updated in place.
        """
        opened = self._opened
        (ids, cross, rule, extra), inputs = self._read(index, prompt, encoded)
        own, config = self._resolve(index, params, len(ids), extra, resolved), opened.module.config
        # Length requested by the caller, ignoring the cache size: without max_model_len, the cache may set the limit.
        room = (self._config.max_model_len or config.max_length) - len(ids)
        asked = len(ids) + (room if params.max_tokens is None else min(params.max_tokens + extra, room))
        fields = dict(limit=len(ids) + own.max_tokens, asked=asked, inputs=inputs, cross=cross, rule=rule)
        return self._made(index, prompt, ids, own, **fields, grammar=self._grammar(index, own, rule))

    def _made(self, index: int, prompt: Prompt, ids: Sequence[int], params: SamplingParams, **fields: Any) -> Request:
        number, config = next(self._numbers), self._opened.module.config
        if prompt.adapter is not None:
            fields["adapter"] = find(self._adapters, prompt.adapter, f"prompt {index}")
        return Request(
            id=str(number),
            prompt=np.array(ids, np.int32),
            params=params,
            salt=(prompt.cache_salt or "").encode(),
            length_key=config.length_key,
            recompute_after=config.recompute_after,
            seed=self._seed(number) if params.seed is None else params.seed,
            **fields,
        )

    def prefills(
        self,
        prompts: Sequence[Prompt],
        wants: Callable[[int, int], Wanted],
        completions: Sequence[Sequence[int]] | None = None,
    ) -> list[Request]:
        """Make a checked request per prompt that ends with its prefill, without queueing it.

        Args:
            prompts: parsed prompts.
            wants: function from the number of tokens of a prompt, and of the prompt with its completion, to what its
                request computes.
            completions: token ids after each prompt, which are scored; by default none.

        Raises:
            TypeError, ValueError: a prompt is invalid; the error names its index.
        """
        params, made = EMBEDDED if completions is None else SCORED, []
        for start in range(0, len(prompts), PIECE):
            piece = prompts[start : start + PIECE]
            for index, (prompt, encoded) in enumerate(zip(piece, self._encode_plain(piece), strict=True), start):
                after = () if completions is None else completions[index]
                (ids, cross, _, _), inputs = self._read(index, prompt, encoded, after)
                whole = [*ids, *after]
                fields = dict(limit=len(whole), inputs=inputs, cross=cross, wanted=wants(len(ids), len(whole)))
                made.append(self._made(index, prompt, whole, params, **fields))
        return made

    def completions(self, values: Any, count: int) -> list[list[int]]:
        """Return the token ids of `count` completions, each a text or token ids.

        Raises:
            TypeError, ValueError: one is empty or invalid, or there are not as many; the error names its index.
        """
        if isinstance(values, str) or (is_sequence(values) and len(values) and isinstance(values[0], int | np.integer)):
            values = [values]
        if not is_sequence(values):
            raise TypeError(f"completions must be texts, token ids, or a list of these, got {describe(values)}")
        if len(values) != count:
            raise ValueError(
                f"there are {count} prompts and {len(values)} completions; pass one completion a prompt, or one prompt "
                "and several completions"
            )
        return [self._completion(value, index) for index, value in enumerate(values)]

    def _completion(self, value: Any, index: int) -> list[int]:
        where = f"completion {index}"
        if isinstance(value, str):
            if self._opened.tokenizer is None:
                raise ValueError(f"{where} is text, but there is no tokenizer; pass token ids")
            check_unicode(value, where)
            ids = self._encode(value)
        elif is_sequence(value):
            ids = [as_token_id(f"every id of {where}", token) for token in value]
        else:
            raise TypeError(f"{where} must be a string or a list of token ids, got {describe(value)}")
        if not ids:
            raise ValueError(f"{where} is empty; there is no token to score")
        check_token_ids(ids, self.limits.vocab_size, index, "completion")
        return ids

    def _grammar(self, index: int, params: SamplingParams, rule: int) -> Grammar | None:
        """Return the compiled grammar of a request; None without structure."""
        if params.structured_outputs is None:
            return None
        if self._config.deterministic:
            raise ValueError(
                f"structured_outputs of prompt {index} is not available with deterministic=True, whose step program "
                "takes no masks; make another LLM without it"
            )
        if rule:
            raise ValueError(
                f"structured_outputs does not apply to prompt {index}: this model's own decoding rule decides which "
                "tokens follow."
            )
        return self._grammars.get(params.structured_outputs)

    def _resolve(
        self, index: int, params: SamplingParams, length: int, extra: int, resolved: _Resolved
    ) -> SamplingParams:
        """Check sampling parameters and fill in model-dependent fields, once for all prompts that share them.

        `length`: tokens of the prompt; `extra`: tokens produced by the model's decoding rule that `max_tokens` does not
            count.
        """
        room = self.limits.max_model_len - length
        most = room if params.max_tokens is None else min(params.max_tokens + extra, room)
        key = id(params), extra, most
        if key not in resolved:
            self._check_params(index, params)
            if extra and params.max_tokens is not None:
                params = dataclasses.replace(params, max_tokens=params.max_tokens + extra)
            encode = None if self._opened.tokenizer is None else self._encode
            resolved[key] = resolve(params, self.limits, prompt_len=length, encode=encode)
        return resolved[key]

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

    def _read(
        self, index: int, prompt: Prompt, encoded: Sequence[int] | None, after: Sequence[int] | None = None
    ) -> tuple[CrossPrompt, PlacedInputs | None]:
        """Return a prompt's checked token ids with its cross-attention inputs, and its media inputs if it has any.

        `after`: completion tokens that must fit after the prompt; None if a token is sampled instead.
        """
        media, inputs, ids, text = self._opened.media, (), encoded or prompt.token_ids, prompt.text
        read, known = CrossPrompt([], None), self.limits.vocab_size
        for one in (prompt, prompt.encoder):
            if one is not None and one.text and one.token_ids is None and self._opened.tokenizer is None:
                raise ValueError(f"prompt {index} is text, but there is no tokenizer; pass prompt_token_ids")
        if self._opened.cross is not None:
            read = self._opened.cross.read(prompt, index, self._encode)
            self._check_cross(index, read.cross)
            ids, known = read.token_ids, known + self._opened.module.config.cross.beyond
        if media is not None:
            inputs = media.read(prompt.media, index)
            text = media.expand(text, inputs, index) if ids is None else text
        ids = self._encode(text, prompt.special_tokens) if ids is None else ids
        if not ids:
            raise ValueError(f"prompt {index} has no tokens; pass a non-empty text, or at least one token id")
        check_token_ids(ids, known, index)
        limits, of_images = self.limits, sum(one.length for one in inputs)
        if after is None:
            check_prompt_length(len(ids), limits.max_model_len, index, of_images, limits.length_hint)
        elif len(ids) + len(after) > limits.max_model_len:
            beside = f" and the {len(after)} of its completion" if after else ""
            raise ValueError(
                f"prompt {index}: its {len(ids)} tokens{beside} exceed the maximum model length of "
                f"{limits.max_model_len}. Shorten the text{limits.length_hint}."
            )
        return read._replace(token_ids=list(ids)), None if media is None else media.place(ids, inputs, index)

    def _check_cross(self, index: int, cross: CrossInputs | None) -> None:
        """Check the encoder's input against the encoder's length limit and vocabulary."""
        source, length = self._opened.module.config.cross, 0 if cross is None else cross.length
        if length > source.longest:
            raise ValueError(
                f"prompt {index}: The encoder prompt (length {length}) is longer than the {source.longest} positions "
                "that the model's encoder takes. Shorten it"
            )
        if cross is not None and not length:
            raise ValueError(f"prompt {index}: The encoder prompt cannot be empty; pass a text or token ids")
        for one in () if cross is None or source.shape else cross.inputs:
            check_token_ids(one.values.tolist(), self.limits.vocab_size, index)

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return encode(self._opened.tokenizer, text, special)

    def _encode_plain(self, prompts: Sequence[Prompt]) -> list[Sequence[int] | None]:
        """Encode text-only prompts as a batch if the tokenizer supports it; the entry of any other prompt is None.

        Batch encoding gives the same ids as encoding one by one, but runs on all processors.
        """
        opened, found = self._opened, [None] * len(prompts)
        plain = [place for place, prompt in enumerate(prompts) if prompt.text and prompt.token_ids is None]
        if (
            opened.media is not None
            or opened.cross is not None
            or len(plain) < 2
            or not encodes_batches(opened.tokenizer)
        ):
            return found
        for special in (False, True):
            places = [place for place in plain if prompts[place].special_tokens is special]
            texts = [prompts[place].text for place in places]
            for place, ids in zip(places, encode_batch(opened.tokenizer, texts, special), strict=True):
                found[place] = ids
        return found

    def _seed(self, number: int) -> int:
        """Derive the seed of a request without one from the engine's seed and the request's number."""
        return int(np.random.SeedSequence([self._config.seed, number, 1]).generate_state(1, np.uint64)[0])
