"""Sampling parameters of a request, with vLLM's names and defaults, strictly validated."""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfer._utils.checks import (
    MAX_INT32,
    MAX_LOGPROBS,
    as_float,
    as_int,
    as_strings,
    as_token_id,
    as_token_ids,
    describe,
    show_int,
)
from jaxinfer._utils.keywords import refuse_unknown
from jaxinfer.structured_outputs import StructuredOutputsParams, as_structured_outputs

MAX_N = 1024
"""Maximum `n`: each sample needs its own row and blocks, so a huge `n` is refused before fan-out."""
MAX_STOP_STRINGS = 64
"""Maximum number of entries of `stop`."""
MAX_STOP_LENGTH = 1024
"""Maximum length in characters of an entry of `stop` or `bad_words`."""
MAX_BAD_WORDS = 256
"""Maximum number of entries of `bad_words`."""
MAX_LOGIT_BIAS = 1024
"""Maximum number of entries of `logit_bias`."""
LOGIT_BIAS_LIMIT = 100.0
"""Biases are clamped to plus or minus this, as in the OpenAI and vLLM APIs."""
MAX_SEED = 2**63 - 1
"""Maximum seed; fits every integer type on the way to the device without wrapping."""
MAX_TOKENS = MAX_INT32
"""Maximum `max_tokens` or `min_tokens`; the model's length is a much lower limit."""
MIN_TEMPERATURE = 0.01
"""Minimum temperature that is not greedy: lower ones overflow the scaled logits, so they are raised to this."""
MAX_TEMPERATURE = 1e6
"""Maximum temperature: far beyond uniform sampling, and finite in float32 with its inverse."""
MAX_NGRAM = 16
"""Maximum `no_repeat_ngram_size`: the sampler compares this many tokens at each position of a sequence."""
MAX_REPETITION_PENALTY, MIN_REPETITION_PENALTY = 100.0, 0.01
"""Limits of `repetition_penalty`: it multiplies and divides logits, which must stay finite."""

_REPLACED = {
    "best_of": "best_of is not supported: use n (all n samples are returned)",
    "do_sample": "use temperature=0 for greedy decoding",
    "early_stopping": "use LLM.beam_search(early_stopping=...)",
    "eos_token_id": "use stop_token_ids",
    "guided_decoding": "use structured_outputs",
    "guided_json": "use structured_outputs={'json': ...}",
    "length_penalty": "use LLM.beam_search(length_penalty=...)",
    "logits_processors": "use logit_bias, allowed_token_ids or bad_words",
    "max_length": "use max_tokens, which counts new tokens only",
    "max_new_tokens": "use max_tokens",
    "min_new_tokens": "use min_tokens",
    "num_return_sequences": "use n",
    "stop_strings": "use stop",
    "response_format": "use structured_outputs={'json': ...}",
    "temp": "use temperature",
    "use_beam_search": "use LLM.beam_search(width=...)",
}

logger = logging.getLogger(__name__)


class DefaultInt(int):
    """Default value of a field, distinguishable from the same integer passed by the caller."""


class RequestOutputKind(enum.Enum):
    """What each streamed output of a request contains."""

    CUMULATIVE = 0
    """All text and tokens so far."""
    DELTA = 1
    """Only what is new since the last output; the concatenated deltas are the final text."""
    FINAL_ONLY = 2
    """Nothing until the request has finished."""


@refuse_unknown(_REPLACED)
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class SamplingParams:
    """Sampling parameters of a request. Immutable; validated on construction, and against a model by `resolve`.

    Integers may be NumPy integers; a bool is not accepted as an integer or number; NaN and infinities are refused.
    Lists become tuples.

    Raises:
        TypeError: a field is unknown, an argument is positional, or a value has the wrong type.
        ValueError: a value is out of range. Both name the field, the value and the limit.
    """

    n: int = 1
    """Number of samples drawn for the prompt, 1 to `MAX_N`; they share the prompt's blocks. Must be 1 when greedy."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token already generated; -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it was generated; -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output; 0.01 to 100, 1 is off."""
    temperature: float = 1.0
    """Divides the logits. 0 is greedy; values in (0, `MIN_TEMPERATURE`) are raised to `MIN_TEMPERATURE`."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose total probability reaches this; in (0, 1]."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 (or -1, stored as 0) keeps all, values above the vocabulary are clamped."""
    min_p: float = 0.0
    """Drop tokens whose probability is below this fraction of the most likely token's; in [0, 1]."""
    seed: int | None = None
    """Random seed, 0 to 2**63 - 1. The same seed gives the same tokens whatever else runs, as long as the logits are
    equal up to rounding in float32. In bfloat16 and float16 the logits of a token may differ by more between batches
    of different sizes: such a difference can still decide between two nearly tied tokens. None derives a seed from
    the engine's seed and the request's number, so that a script gives the same tokens each time it runs.
    """
    stop: Sequence[str] | str | None = ()
    """Strings that end the output; at most `MAX_STOP_STRINGS` of `MAX_STOP_LENGTH` characters. They are matched in
    the text, and in the text including special tokens that `skip_special_tokens` leaves out, so that "<|im_end|>"
    stops, too.
    """
    stop_token_ids: Sequence[int] | None = ()
    """Token ids that end the output, in addition to the model's EOS."""
    bad_words: Sequence[str] | None = ()
    """Strings that must not appear in the output; at most `MAX_BAD_WORDS`. A match that begins in the prompt is not
    prevented, as in vLLM.
    """
    ignore_eos: bool = False
    """Continue past the model's EOS ids."""
    max_tokens: int | None = DefaultInt(16)
    """Maximum number of new tokens; None means up to the model's length, which also limits larger values. If the
    cache holds fewer tokens, the result says so in `metrics.clamped_max_tokens`.
    """
    min_tokens: int = 0
    """Minimum number of new tokens before EOS, stop ids and stop strings apply."""
    logprobs: int | None = None
    """Number of most likely tokens to return log-probabilities of, beside the chosen one; 0 to `MAX_LOGPROBS`. They are
    those of the model's distribution, before temperature and all other parameters, unless the LLM was made with another
    `logprobs_mode` (`EngineConfig.logprobs_mode`).
    """
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    detokenize: bool = True
    """Whether to detokenize the output."""
    skip_special_tokens: bool = True
    """Whether to leave special tokens out of the text."""
    spaces_between_special_tokens: bool = True
    """Whether to put spaces between special tokens (only with tokenizers without a Rust backend)."""
    include_stop_str_in_output: bool = False
    """Whether to keep the matched stop string at the end of the text."""
    output_kind: RequestOutputKind = RequestOutputKind.DELTA
    """What each output of `LLM.stream` contains; `generate` and `chat` always return whole results."""
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    """Bias added to the logits of at most `MAX_LOGIT_BIAS` token ids; clamped to +-`LOGIT_BIAS_LIMIT`."""
    allowed_token_ids: Sequence[int] | None = None
    """Token ids that may be sampled; None allows all."""
    no_repeat_ngram_size: int = 0
    """Size of n-grams, over prompt and output, that must not repeat; 0 is off, at most `MAX_NGRAM`."""
    forced_bos_token_id: int | None = None
    """Token forced first if the prompt is a single token, as for encoder-decoder models; -1 for none, None for the
    value of generation_config.json.
    """
    forced_eos_token_id: int | None = None
    """Token forced last if the output reaches its maximum length; -1 and None as for `forced_bos_token_id`."""
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    """Structure that the output must have: a `StructuredOutputsParams`, or a dict of one of its fields such as
    `{"json": schema}`. The output ends when it is complete, also before `min_tokens` and with `ignore_eos`.
    """
    _bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    _bad_words_ids: tuple[tuple[int, ...], ...] = ()
    _eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_counts()
        self._check_flags()
        self._check_strings()
        self._check_token_ids()
        self._set("structured_outputs", as_structured_outputs(self.structured_outputs))
        self._check_together()

    def _check_numbers(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            value = self._number(name)
            if not -2.0 <= value <= 2.0:
                raise ValueError(f"{name} must be in [-2, 2], got {value}.")
        value = self._number("repetition_penalty")
        if not MIN_REPETITION_PENALTY <= value <= MAX_REPETITION_PENALTY:
            limits = f"[{MIN_REPETITION_PENALTY:g}, {MAX_REPETITION_PENALTY:g}]"
            raise ValueError(f"repetition_penalty must be in {limits}, got {value}.")
        value = self._number("temperature")
        if value < 0.0:
            raise ValueError(f"temperature must be non-negative, got {value}.")
        if value > MAX_TEMPERATURE:
            raise ValueError(f"temperature must be at most {MAX_TEMPERATURE:g}, got {value}.")
        if 0.0 < value < MIN_TEMPERATURE:
            _warn_temperature_raised()
            self._set("temperature", MIN_TEMPERATURE)
        value = self._number("top_p")
        if not 0.0 < value <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {value}.")
        value = self._number("min_p")
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"min_p must be in [0, 1], got {value}.")

    def _check_counts(self) -> None:
        self._integer("n", 1, MAX_N)
        top_k = as_int("top_k", self.top_k)
        if top_k < -1:
            raise ValueError(f"top_k must be 0 (disable), or at least 1, got {show_int(top_k)}.")
        self._set("top_k", min(max(top_k, 0), MAX_INT32))
        self._integer("min_tokens", 0, MAX_TOKENS)
        self._integer("no_repeat_ngram_size", 0, MAX_NGRAM)
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            if getattr(self, name) is not None:
                self._integer(name, -1, MAX_INT32)
        for name, low, high in (
            ("seed", 0, MAX_SEED),
            ("max_tokens", 1, MAX_TOKENS),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
        ):
            if getattr(self, name) is not None:
                self._integer(name, low, high)

    def _check_flags(self) -> None:
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            value = getattr(self, name)
            if not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"{name} must be True or False, got {describe(value)}.")
            self._set(name, bool(value))
        if not isinstance(self.output_kind, RequestOutputKind):
            raise TypeError(
                "output_kind must be RequestOutputKind.CUMULATIVE, .DELTA or .FINAL_ONLY, "
                f"got {describe(self.output_kind)}."
            )

    def _check_strings(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        self._set("stop", as_strings("stop", stop, most=MAX_STOP_STRINGS, longest=MAX_STOP_LENGTH))
        words = as_strings("bad_words", self.bad_words, most=MAX_BAD_WORDS, longest=MAX_STOP_LENGTH)
        self._set("bad_words", words)

    def _check_token_ids(self) -> None:
        self._set("stop_token_ids", as_token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            allowed = as_token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise ValueError("allowed_token_ids cannot be empty: leave it None to allow every token.")
            self._set("allowed_token_ids", allowed)
        if self.logit_bias is not None:
            self._set("logit_bias", _as_logit_bias(self.logit_bias))

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, got {self.min_tokens}."
            )
        if self.stop and not self.detokenize:
            raise ValueError(
                "stop strings are matched in the text: set detokenize=True to use stop, or use stop_token_ids."
            )
        if self.structured_outputs is not None and self.forced_eos_token_id not in (None, -1):
            raise ValueError(
                "forced_eos_token_id does not apply with structured_outputs, which says where an output may end: got "
                f"{self.forced_eos_token_id}; leave it None or -1."
            )
        if self.greedy and self.n > 1:
            raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}.")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _number(self, name: str) -> float:
        value = as_float(name, getattr(self, name))
        self._set(name, value)
        return value

    def _integer(self, name: str, low: int, high: int) -> None:
        value = as_int(name, getattr(self, name))
        if value < low and "logprobs" not in name:
            raise ValueError(f"{name} must be at least {low}, got {show_int(value)}.")
        if not low <= value <= high:
            raise ValueError(f"{name} must be between {low} and {high}, got {show_int(value)}.")
        if not isinstance(getattr(self, name), DefaultInt):
            self._set(name, value)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature == 0.0

    @property
    def bad_words_token_ids(self) -> tuple[tuple[int, ...], ...]:
        """Token sequences whose last token is masked if the others precede it; complete after `resolve`."""
        return self._bad_words_token_ids

    @property
    def bad_words_ids(self) -> tuple[tuple[int, ...], ...]:
        """`bad_words_ids` of a transformers `GenerationConfig`, which also match in the prompt.

        Without EOS after `resolve`.
        """
        return self._bad_words_ids

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The model's EOS ids that end this request: set by `resolve`, empty with `ignore_eos`."""
        return self._eos_token_ids

    @functools.cached_property
    def all_stop_token_ids(self) -> frozenset[int]:
        """EOS and stop ids: masked before `min_tokens`, ending the output after."""
        return frozenset(self._eos_token_ids).union(self.stop_token_ids or ())

    def __repr__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if not field.name.startswith("_") and getattr(self, field.name) != field.default
        ]
        return f"SamplingParams({', '.join(changed)})"


def _as_logit_bias(values: Any) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise TypeError(f"logit_bias must be a dict from token id to bias, got {describe(values)}.")
    if len(values) > MAX_LOGIT_BIAS:
        raise ValueError(f"logit_bias can have at most {MAX_LOGIT_BIAS} entries, got {len(values)}.")
    bias = {}
    for key, value in values.items():
        token = as_token_id("every key of logit_bias", key)
        number = as_float(f"logit_bias[{token}]", value)
        bias[token] = max(-LOGIT_BIAS_LIMIT, min(LOGIT_BIAS_LIMIT, number))
    return bias


@functools.cache
def _warn_temperature_raised() -> None:
    # Cached, so that it is logged once per process.
    logger.warning(
        "temperatures above 0 and below %s overflow the logits and are raised to it; 0 is greedy.", MIN_TEMPERATURE
    )
