"""Read sampling parameters from the fields of a request."""

import dataclasses
from typing import Any

from jaxinfer.sampling_params import RequestOutputKind, SamplingParams
from jaxinfer.serve.body import Fields
from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import APIError, wrong_type
from jaxinfer.serve.structure import Structure

COMMON = (
    "model",
    "n",
    "stop",
    "seed",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "stream",
    "stream_options",
)
"""Fields of OpenAI's requests that both completion endpoints read."""
EXTRA = (
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "bad_words",
    "allowed_token_ids",
    "no_repeat_ngram_size",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
"""Fields that are not OpenAI's, with the names of `SamplingParams`."""
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)
"""Fields that change nothing about the answer of a server with one model."""

MAX_BIAS = 100
"""Largest absolute value of a bias, as in OpenAI's API."""


def read(
    context: Context,
    fields: Fields,
    *,
    prompts: int = 1,
    logprobs: int | None,
    default: int | None = None,
    limit: str = "max_tokens",
    structure: Structure | None = None,
) -> SamplingParams:
    """Return the sampling parameters of a request; those that it leaves out are the model's defaults.

    Args:
        context: server.
        fields: body of the request.
        prompts: number of prompts.
        logprobs: number of most likely tokens to return at each position; None for none.
        default: maximum number of new tokens if the request sets none; None for no limit but the model's length.
        limit: field with the maximum number of new tokens.
        structure: structure of the answers.

    Raises:
        APIError, TypeError, ValueError: a value is invalid or above a limit; the error names the field.
    """
    found: dict[str, Any] = {"max_tokens": _limit(context, fields, limit, default), "logprobs": logprobs}
    for name in ("n", "seed", "temperature", "top_p", "presence_penalty", "frequency_penalty", "stop", *EXTRA):
        if fields.raw(name) is not None:
            found[name] = fields.raw(name)
    if isinstance(found.get("seed"), int) and -(2**63) <= found["seed"] < 0:
        found["seed"] += 2**63  # OpenAI's seeds may be negative
    if fields.raw("logit_bias") is not None:
        found["logit_bias"] = _logit_bias(fields.get("logit_bias", dict))
    if structure is not None:
        found["structured_outputs"] = structure.params
    streamed = fields.get("stream", bool, False)
    found["output_kind"] = RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY
    params = dataclasses.replace(context.llm.default_params, **found)
    context.check_samples(params.n, prompts)
    return params


def _limit(context: Context, fields: Fields, name: str, default: int | None) -> int | None:
    requested, most = fields.get(name, int), context.config.max_tokens
    if requested is not None and requested < 1:
        raise APIError(f"{name} must be at least 1, got {str(requested)[:40]}.", param=name)
    if most is None:
        return default if requested is None else requested
    if requested is not None and requested > most:
        raise APIError(
            f"{name} must be at most {most} (max_tokens of this server), got {str(requested)[:40]}.", param=name
        )
    return requested or min(default or most, most)


def _logit_bias(values: dict[str, Any]) -> dict[int, Any]:
    """Convert the keys of a JSON object to token ids."""
    for key, value in values.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 10:
            raise wrong_type("logit_bias", "an object from token ids to biases", key)
        if isinstance(value, int | float) and not -MAX_BIAS <= value <= MAX_BIAS:
            raise APIError(
                f"logit_bias of token {key} must be between -{MAX_BIAS} and {MAX_BIAS}, got {value}.",
                param="logit_bias",
            )
    return {int(key): value for key, value in values.items()}


def stream_usage(fields: Fields) -> bool:
    """Return whether the stream ends with a chunk of usage (`stream_options.include_usage`)."""
    options = fields.get("stream_options", dict)
    if options is None:
        return False
    if not fields.get("stream", bool, False):
        raise APIError("stream_options is only allowed with stream=true.", param="stream_options")
    inner = Fields(options, "stream_options.")
    inner.check_known(("include_usage", "include_obfuscation"), {})
    return inner.get("include_usage", bool, False)
