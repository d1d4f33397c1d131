"""Sampling parameters out of transformers' `GenerationConfig` and a model's generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer._utils.checks import as_int, as_token_id, as_token_ids, describe
from jaxinfer.checkpoint.hf import whole
from jaxinfer.errors import ConfigError
from jaxinfer.sampling_params import SamplingParams

_RENAMED = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "stop_strings": "stop",
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")

# Attributes that change which tokens come out and are not supported, each with the values that mean "off".
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
"""What a passed configuration that leaves it at None takes from the model's file."""
_TRANSFORMERS_MAX_LENGTH = 20
_TRANSFORMERS_TOP_K = 50


def from_generation_config(config: Any, model: Mapping[str, Any] | None = None) -> SamplingParams:
    """The `SamplingParams` that mean what a transformers `GenerationConfig` means there.

    Sampling is greedy unless `do_sample` is true, and then `top_k` defaults to 50, as in transformers.
    `eos_token_id` replaces the model's EOS ids. A phrase of `bad_words_ids` may not be completed if it begins in the
    prompt either, and an EOS id in the list is not banned. `max_length`, which counts the prompt, is refused unless it
    is transformers' default of 20 or `max_new_tokens` is there too; with neither, `max_tokens` keeps its
    default. Attributes about speed, memory and extra outputs are ignored.

    Args:
        config: a `GenerationConfig`, or anything with `to_dict()`, or its dict.
        model: the model's generation_config.json as plain JSON. As in transformers 5, `do_sample`, temperature, top-p,
            top-k, min-p, penalty, n-gram size and numbers of new tokens that `config` leaves at None are taken from it.

    Raises:
        TypeError: something else.
        ValueError: attributes that change the result and are not supported (all are listed), or values out of
            range.
    """
    values = _to_dict(config)
    _refuse_unsupported(values)
    _refuse_total_lengths(values)
    values = {name: whole(model[name]) for name in _FILLED if (model or {}).get(name) is not None} | values
    fields = {ours: values[theirs] for theirs, ours in _RENAMED.items() if theirs in values}
    if values.get("do_sample"):
        fields |= {name: values[name] for name in _SAMPLING if name in values}
        fields.setdefault("top_k", _TRANSFORMERS_TOP_K)
    else:
        fields["temperature"] = 0.0
    fields |= {name: token for name in FORCED if (token := forced_id(values, name)) is not None}
    ends = ()  # those of the model, which `resolve` knows
    if "eos_token_id" in values:
        ends = _ids("eos_token_id", values["eos_token_id"])
        fields |= {"stop_token_ids": ends, "ignore_eos": True}
    suppressed = tuple((token,) for token in as_token_ids("suppress_tokens", values.get("suppress_tokens")))
    return SamplingParams(**fields, _bad_words_token_ids=suppressed, _bad_words_ids=_bad_words(values, ends))


def default_params(generation_config: Mapping[str, Any], *, encoder_decoder: bool = False) -> SamplingParams:
    """The parameters a request gets when the user passes none, from a model's generation_config.json.

    temperature, top_p, top_k, min_p, repetition_penalty, no_repeat_ngram_size and max_new_tokens are taken where they
    are given, whatever `do_sample` says (as vLLM does); everything else keeps the defaults of `SamplingParams`.

    Args:
        generation_config: the file as plain JSON; empty where a model has none.
        encoder_decoder: a model with an encoder is greedy unless `do_sample` is true, and `max_length` and
            `min_length`, which count the decoder's start token, are taken too.

    Raises:
        ConfigError: a value `SamplingParams` refuses; the message names the file.
    """
    names = {name: name for name in (*_SAMPLING, "repetition_penalty", "no_repeat_ngram_size")}
    names |= {"max_new_tokens": "max_tokens"}
    fields = {
        ours: whole(generation_config[theirs])
        for theirs, ours in names.items()
        if generation_config.get(theirs) is not None
    }
    if encoder_decoder:
        fields |= {} if generation_config.get("do_sample") else {"temperature": 0.0}
        for theirs, ours in (("max_length", "max_tokens"), ("min_length", "min_tokens")):
            total = whole(generation_config.get(theirs))
            if ours not in fields and isinstance(total, int) and total > 1:
                fields[ours] = total - 1
    try:
        return SamplingParams(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"generation_config.json: {error} Correct the value, or leave it out of the file.") from error


FORCED = ("forced_bos_token_id", "forced_eos_token_id")


def forced_id(source: Mapping[str, Any], name: str) -> int | None:
    """The token that one of `FORCED` names in a generation configuration or config.json; None: it names none.

    Raises:
        ConfigError: it is no integer or list of integers, or names several.
    """
    if source.get(name) is None:
        return None
    ids = _model_ids(name, source[name])
    if len(ids) > 1:
        raise ConfigError(f"{name} may be a single token, got {describe(source[name])}: pass one of them.")
    return ids[0] if ids else None


def eos_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end an output: of generation_config.json, else of config.json, as in transformers.

    Args:
        config: config.json as plain JSON; `text_config` or `llm_config` is looked into when the top level names no id.
        generation_config: generation_config.json as plain JSON; empty where a model has none.

    Raises:
        ConfigError: `eos_token_id` is not an integer or a list of integers.
    """
    for source in (generation_config, config, config.get("text_config"), config.get("llm_config")):
        if isinstance(source, Mapping) and source.get("eos_token_id") is not None:
            return _model_ids("eos_token_id", source["eos_token_id"])
    return ()


def _model_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return the ids that a file of the model names, as `_ids`; what is wrong there is an error of the checkpoint's."""
    try:
        ids = value if isinstance(value, (list, tuple)) else [value]
        return _ids(name, [whole(token) for token in ids])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} in generation_config.json or config.json: {error}") from error


def _bad_words(values: Mapping[str, Any], ends: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return `bad_words_ids` without the tokens `ends` alone, which end an output and are never banned in
    transformers."""
    words = values.get("bad_words_ids", ())
    if not isinstance(words, (list, tuple)):
        raise TypeError(f"bad_words_ids must be a list of lists of token ids, got {describe(words)}.")
    for index, word in enumerate(words):
        if not isinstance(word, (list, tuple)) or not word:
            raise ValueError(f"bad_words_ids[{index}] must be a list of token ids, not empty.")
    sequences = [tuple(as_token_id("every id in bad_words_ids", token) for token in word) for word in words]
    return tuple(word for word in sequences if word not in {(token,) for token in ends})


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """One id or a list of them; negative ones mean none in transformers, and are dropped."""
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
        raise ValueError(f"GenerationConfig sets what is not supported: {', '.join(found)}. Leave them out.{hint}")


def _refuse_total_lengths(values: Mapping[str, Any]) -> None:
    longest = values.get("max_length", _TRANSFORMERS_MAX_LENGTH)
    if longest != _TRANSFORMERS_MAX_LENGTH and "max_new_tokens" not in values:
        raise ValueError(f"max_length={describe(longest)} counts the prompt too: set max_new_tokens instead.")
    if values.get("min_length", 0) != 0 and "min_new_tokens" not in values:
        raise ValueError(
            f"min_length={describe(values['min_length'])} counts the prompt too: set min_new_tokens instead."
        )
