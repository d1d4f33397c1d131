"""What a request's parameters ask of the sampler: its level, packed parameters, biases and forbidden tokens."""

from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from jaxinfer.engine.request import Request, Sequence
from jaxinfer.engine.sampling.sampling_rows import Level, SamplingRows, pack_rows
from jaxinfer.sampling_params import SamplingParams


def sampler_level(request: Request) -> Level:
    """Return the lowest level that serves every step of a request, apart from the temporary masks of `forbidden`."""
    p = request.params
    penalties = p.repetition_penalty, p.presence_penalty, p.frequency_penalty, p.no_repeat_ngram_size
    if penalties != (1, 0, 0, 0) or is_biased(request) or request.rule:
        return Level.EDITED
    if p.temperature == 0:
        return Level.GREEDY
    return Level.TRUNCATED if p.top_k > 0 or p.top_p < 1 else Level.RANDOM


def is_biased(request: Request) -> bool:
    """Return whether some tokens are biased or forbidden in every step of a request."""
    p = request.params
    return bool(p.logit_bias or p.allowed_token_ids is not None or any(len(words) == 1 for words in _bad_words(p)))


def forbids_for_a_while(request: Request) -> bool:
    """Return whether `forbidden` may return tokens in some steps of a request."""
    return (request.params.min_tokens > 0 and bool(request.stop_ids)) or bool(_phrases(request.params))


def sampling_row(sequence: Sequence) -> np.ndarray:
    """Return the packed sampling parameters of a running sequence, `[WIDTH]`; the step sets the position."""
    request, p = sequence.request, sequence.request.params
    values = SamplingRows(
        row=sequence.row,
        position=0,
        key=sequence.key[None],
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        presence=p.presence_penalty,
        frequency=p.frequency_penalty,
        repetition=p.repetition_penalty,
        edited=sampler_level(request) >= Level.EDITED,
        prompt_length=len(request.prompt),
        logprobs=p.logprobs is not None,
        ngram=p.no_repeat_ngram_size,
        forced_first=_forced(p.forced_bos_token_id if len(request.prompt) == 1 else None),
        forced_last=_forced(p.forced_eos_token_id),
        last_position=request.limit - 1,
        rule=request.rule,
    )
    return pack_rows(SamplingRows(*map(np.atleast_1d, values)))[0]


def _forced(token: int | None) -> int:
    """Encode a forced token for the sampler: token id + 1, or 0 for none."""
    return 0 if token is None or token < 0 else token + 1


def _bad_words(params: SamplingParams) -> tuple[tuple[int, ...], ...]:
    """Return all token sequences that must not be completed."""
    return params.bad_words_token_ids + params.bad_words_ids


def _phrases(params: SamplingParams) -> list[tuple[int, ...]]:
    """Return the bad words of several tokens: the last token is forbidden only after the others."""
    return [words for words in _bad_words(params) if len(words) > 1]


def forbidden(sequence: Sequence, position: int) -> tuple[int, ...]:
    """Return the sorted token ids that are forbidden at `position` but not in every step.

    They are stop tokens before `min_tokens`, and the last token of each bad word whose other tokens precede the
    position: in the output, or for transformers' `bad_words_ids` in prompt and output.
    """
    request, params = sequence.request, sequence.request.params
    prompt, found = len(request.prompt), set()
    if position - prompt < params.min_tokens:
        found |= request.stop_ids
    for words in _phrases(params):
        start = position - len(words) + 1
        first = 0 if words in params.bad_words_ids else prompt
        if start >= first and np.array_equal(sequence.tokens[start:position], words[:-1]):
            found.add(words[-1])
    return tuple(sorted(found))


def bias_row(sequence: Sequence, position: int, vocab: int) -> tuple[tuple[int, ...], Items[Any] | np.ndarray]:
    """Return version and bias `[V']` of the token at `position`; the bias is empty if the device has it.

    The version is `forbidden`, as everything else is the same in every step.
    """
    params, version = sequence.request.params, forbidden(sequence, position)
    if version == sequence.bias_version:
        return version, ()
    bias = np.zeros(vocab, np.float32)
    if params.allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[list(params.allowed_token_ids)] = 0
    for token, value in (params.logit_bias or {}).items():
        bias[token] += value
    bias[[words[0] for words in _bad_words(params) if len(words) == 1] + list(version)] = -np.inf
    return version, bias


def depends_on_history(request: Request) -> bool:
    """Return whether the host must have read every token before it can prepare the next step."""
    return request.beams is not None or bool(_phrases(request.params))
