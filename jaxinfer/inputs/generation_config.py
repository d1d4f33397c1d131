"""Convert transformers' `GenerationConfig` and a model's generation_config.json to sampling parameters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from jaxinfer._utils.checks import as_int, as_token_id, as_token_ids, describe
from jaxinfer.checkpoint.plain_json import shorten
from jaxinfer.checkpoint.size_limits import int_if_whole
from jaxinfer.errors import ConfigError
from jaxinfer.sampling_params import SamplingParams

log = logging.getLogger(__name__)

_RENAMED = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "stop_strings": "stop",
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")

# Unsupported attributes that change which tokens are generated, with the values that disable them.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "guidance_scale": (1.0,),
    "max_time": (),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0.0,),
    "sequence_bias": ({}, []),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1.0,),
    "watermarking_config": (),
}
_FILLED = ("do_sample", *_SAMPLING, "max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size")
"""Attributes taken from the model's generation_config.json if the passed `GenerationConfig` has None for them."""
_TRANSFORMERS_MAX_LENGTH = 20
_TRANSFORMERS_TOP_K = 50


def from_generation_config(config: Any, model: Mapping[str, Any] | None = None) -> SamplingParams:
    """Convert a transformers `GenerationConfig` to `SamplingParams` of the same meaning.

    Sampling is greedy unless `do_sample` is true, and then `top_k` defaults to 50, as in transformers.
    `eos_token_id` replaces the model's EOS ids. A phrase of `bad_words_ids` is also banned if it begins in the prompt;
    an EOS id in the list is not banned. `max_length`, which counts the prompt, is rejected unless it is transformers'
    default of 20 or `max_new_tokens` is set as well; with neither set, `max_tokens` keeps its default. Attributes that
    only affect speed, memory or extra outputs are ignored.

    Args:
        config: a `GenerationConfig`, any object with `to_dict()`, or such a dict.
        model: the model's generation_config.json as plain JSON. As in transformers 5, it supplies `do_sample`,
            temperature, top-p, top-k, min-p, repetition penalty, n-gram size and new-token counts that are None in
            `config`.

    Raises:
        TypeError: `config` is neither a dict nor an object with `to_dict()`.
        ValueError: unsupported attributes that would change the result (all are listed), or values out of range.
    """
    values = _to_dict(config)
    _refuse_unsupported(values)
    _refuse_total_lengths(values)
    values = {name: int_if_whole(model[name]) for name in _FILLED if (model or {}).get(name) is not None} | values
    fields = {own_name: values[hf_name] for hf_name, own_name in _RENAMED.items() if hf_name in values}
    if values.get("do_sample"):
        fields |= {name: values[name] for name in _SAMPLING if name in values}
        fields.setdefault("top_k", _TRANSFORMERS_TOP_K)
    else:
        fields["temperature"] = 0.0
    fields |= {name: token for name in FORCED if (token := forced_id(values, name)) is not None}
    ends = ()  # `resolve` fills in the model's EOS ids
    if "eos_token_id" in values:
        ends = _ids("eos_token_id", values["eos_token_id"])
        fields |= {"stop_token_ids": ends, "ignore_eos": True}
    suppressed = tuple((token,) for token in as_token_ids("suppress_tokens", values.get("suppress_tokens")))
    return SamplingParams(**fields, _bad_words_token_ids=suppressed, _bad_words_ids=_bad_words(values, ends))


def default_params(generation_config: Mapping[str, Any], *, encoder_decoder: bool = False) -> SamplingParams:
    """Return the default sampling parameters of a model, from its generation_config.json.

    temperature, top_p, top_k, min_p, repetition_penalty, no_repeat_ngram_size and max_new_tokens are taken from the
    file if set there, regardless of `do_sample` (as in vLLM); all other fields keep the defaults of `SamplingParams`.

    Args:
        generation_config: generation_config.json as plain JSON; empty if the model has no such file.
        encoder_decoder: whether the model has an encoder. If so, decoding is greedy unless `do_sample` is true, and
            `max_length` and `min_length`, which count the decoder's start token, are taken as well.

    Raises:
        ConfigError: `SamplingParams` rejects a value; the error names the file.
    """
    names = {name: name for name in (*_SAMPLING, "repetition_penalty", "no_repeat_ngram_size")}
    names |= {"max_new_tokens": "max_tokens"}
    fields = {
        own_name: int_if_whole(generation_config[hf_name])
        for hf_name, own_name in names.items()
        if generation_config.get(hf_name) is not None
    }
    if encoder_decoder:
        fields |= {} if generation_config.get("do_sample") else {"temperature": 0.0}
        for hf_name, own_name in (("max_length", "max_tokens"), ("min_length", "min_tokens")):
            total = int_if_whole(generation_config.get(hf_name))
            if own_name not in fields and isinstance(total, int) and total > 1:
                fields[own_name] = total - 1
    try:
        return SamplingParams(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"generation_config.json: {error} Correct the value, or leave it out of the file.") from error


FORCED = ("forced_bos_token_id", "forced_eos_token_id")


def forced_id(source: Mapping[str, Any], name: str) -> int | None:
    """Return the token id of a `FORCED` field of generation_config.json or config.json; None if not set.

    Raises:
        ConfigError: the value is not an integer or a list of integers, or lists several tokens.
    """
    if source.get(name) is None:
        return None
    ids = _model_ids(name, source[name])
    if len(ids) > 1:
        raise ConfigError(f"{name} must be one token id, got {list(ids)}; keep one of them.")
    return ids[0] if ids else None


def eos_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any], tokenizer: Any = None) -> tuple[int, ...]:
    """Return the EOS token ids of generation_config.json, else of config.json, and that of the tokenizer, as in vLLM.

    Fine-tuning tools often set the tokenizer's EOS token to the end of a chat turn, and leave the base model's EOS id
    in the other files. Without the tokenizer's, the answers of such a model would never end.

    Args:
        config: config.json as plain JSON; `text_config`, then `llm_config`, is read if the top level has no
            `eos_token_id`.
        generation_config: generation_config.json as plain JSON; empty if the model has no such file.
        tokenizer: tokenizer of the model; None if only token ids are served.

    Raises:
        ConfigError: `eos_token_id` is not an integer or a list of integers.
    """
    found: tuple[int, ...] = ()
    for source in (generation_config, config, config.get("text_config"), config.get("llm_config")):
        if isinstance(source, Mapping) and source.get("eos_token_id") is not None:
            found = _model_ids("eos_token_id", source["eos_token_id"])
            break
    own = getattr(tokenizer, "eos_token_id", None)
    if own is None or own in found:
        return found
    if found:
        log.info(
            "the tokenizer's EOS token %r (%d) ends an output, beside the EOS ids %s of generation_config.json or "
            "config.json",
            tokenizer.eos_token,
            own,
            list(found),
        )
    return (*found, own)


def _model_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return the token ids of a field of the model's files like `_ids`, but raise ConfigError for wrong values."""
    try:
        ids = value if isinstance(value, (list, tuple)) else [value]
        return _ids(name, [int_if_whole(token) for token in ids])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} in generation_config.json or config.json: {error}") from error


def _bad_words(values: Mapping[str, Any], ends: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return `bad_words_ids` without single EOS tokens (`ends`), which transformers never bans."""
    words = values.get("bad_words_ids", ())
    if not isinstance(words, (list, tuple)):
        raise TypeError(
            f"bad_words_ids must be a list of lists of token ids, got {describe(words)}; wrap it in a list."
        )
    for index, word in enumerate(words):
        if not isinstance(word, (list, tuple)) or not word:
            raise ValueError(
                f"bad_words_ids[{index}] must be a non-empty list of token ids, got {shorten(repr(word), 80)}; "
                "correct it, or leave it out."
            )
    sequences = [tuple(as_token_id("every id in bad_words_ids", token) for token in word) for word in words]
    return tuple(word for word in sequences if word not in {(token,) for token in ends})


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """Convert one id or a list to a tuple of ids; negative ids, which mean "none" in transformers, are dropped."""
    ids = value if isinstance(value, (list, tuple)) else [value]
    return as_token_ids(name, [i for i in ids if as_int(f"every id in {name}", i) >= 0])


def _to_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        values = dict(config)
    elif callable(getattr(config, "to_dict", None)):
        values = config.to_dict()
    else:
        raise TypeError(f"sampling_params must be a SamplingParams or a GenerationConfig, got {describe(config)}.")
    return {name: value for name, value in values.items() if value is not None}


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    found = [
        f"{name}={describe(values[name])}"
        for name, neutral in _UNSUPPORTED.items()
        if name in values and not any(values[name] == off for off in neutral)
    ]
    if found:
        hint = " LLM.beam_search searches with beams." if any(name.startswith("num_beams=") for name in found) else ""
        raise ValueError(f"GenerationConfig sets unsupported attributes: {', '.join(found)}; leave them out.{hint}")


def _refuse_total_lengths(values: Mapping[str, Any]) -> None:
    longest = values.get("max_length", _TRANSFORMERS_MAX_LENGTH)
    if longest != _TRANSFORMERS_MAX_LENGTH and "max_new_tokens" not in values:
        raise ValueError(f"max_length={describe(longest)} counts the prompt too: set max_new_tokens instead.")
    if values.get("min_length", 0) != 0 and "min_new_tokens" not in values:
        raise ValueError(
            f"min_length={describe(values['min_length'])} counts the prompt too: set min_new_tokens instead."
        )
