"""Check sampling parameters against a model's vocabulary and length limits, and fill in model defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxinfer._utils.checks import describe
from jaxinfer.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class ModelLimits:
    """Vocabulary and length limits of a model, as `resolve` needs them."""

    vocab_size: int
    """Rows of the output layer, V."""
    max_model_len: int
    """Maximum tokens of a sequence, prompt and output together."""
    eos_token_ids: tuple[int, ...] = ()
    """Token ids that end an output unless `ignore_eos` is set."""
    forced_bos_token_id: int | None = None
    """Token forced as the first output token after a prompt of one token; None for no forced token."""
    forced_eos_token_id: int | None = None
    """Token forced as the last output token when an output reaches its maximum length; None for no forced token."""
    tokenizer_len: int | None = None
    """Highest token id of the tokenizer plus 1; higher ids of the output layer are padding and are never sampled."""
    length_hint: str = ""
    """Error text that says what limits `max_model_len` and how to raise it (`length_remedy`)."""

    @property
    def usable(self) -> int:
        """Number of token ids that can be sampled, from 0 on."""
        return self.vocab_size if self.tokenizer_len is None else min(self.vocab_size, self.tokenizer_len)


def length_remedy(max_model_len: int, requested: int | None, allowed: int, *, contiguous: bool = False) -> str:
    """Return an error text that says what limits the length of a sequence and how to raise the limit.

    The text completes a sentence that tells the user to shorten the prompt or output.

    Args:
        max_model_len: effective maximum tokens of a sequence.
        requested: the user's `max_model_len` setting; None if not set.
        allowed: maximum tokens of a sequence that the model supports.
        contiguous: whether the cache is contiguous (one region per row) instead of paged (a pool of blocks).
    """
    if max_model_len >= allowed:
        return ": the model allows no more (max_position_embeddings)"
    if requested is not None:
        return f", or raise max_model_len: the model allows {allowed}"
    fewer = " or lower max_num_seqs" if contiguous else ""
    return (
        f", or raise kv_cache_memory_bytes{fewer}: the model allows {allowed} tokens, and the cache has room for "
        f"{max_model_len}"
    )


def resolve(
    params: SamplingParams,
    limits: ModelLimits,
    *,
    prompt_len: int,
    encode: Callable[[str], Sequence[int]] | None = None,
) -> SamplingParams:
    """Check `params` against the model's limits and fill in the fields that depend on the model.

    The result has `max_tokens` set (clamped to `max_model_len` less the prompt), `top_k` within the vocabulary, and
    complete `bad_words_token_ids` and `eos_token_ids`. Do not pass the result to `resolve` again.

    Args:
        params: sampling parameters as the user made them.
        limits: limits of the model.
        prompt_len: tokens of the prompt, less than `limits.max_model_len`.
        encode: encodes a text to token ids without special tokens; only `bad_words` needs it.

    Raises:
        ValueError: a token id is outside the vocabulary, every token is masked, or `min_tokens` exceeds `max_tokens`.
    """
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        _check_in_vocabulary(name, getattr(params, name) or (), limits.vocab_size)
    for ids in params._bad_words_token_ids + params._bad_words_ids:
        _check_in_vocabulary("bad_words_ids", ids, limits.vocab_size)
    room = limits.max_model_len - prompt_len
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    if params.min_tokens > max_tokens:
        raise ValueError(
            f"min_tokens must be less than or equal to max_tokens={max_tokens} (the maximum "
            f"model length of {limits.max_model_len} less the prompt's {prompt_len}), "
            f"got {params.min_tokens}. Lower it{limits.length_hint}."
        )
    # A checkpoint may list EOS ids beyond its output layer; they cannot be sampled.
    eos = () if params.ignore_eos else tuple(i for i in limits.eos_token_ids if i < limits.vocab_size)
    resolved = dataclasses.replace(
        params,
        max_tokens=max_tokens,
        top_k=min(params.top_k, limits.vocab_size),
        _bad_words_token_ids=params._bad_words_token_ids + _encode_bad_words(params, limits, encode),
        _bad_words_ids=tuple(words for words in params._bad_words_ids if words not in {(token,) for token in eos}),
        _eos_token_ids=eos,
        **{name: _forced(name, params, limits) for name in ("forced_bos_token_id", "forced_eos_token_id")},
    )
    _check_something_left(resolved, limits.usable)
    return resolved


def _forced(name: str, params: SamplingParams, limits: ModelLimits) -> int | None:
    """Return the forced token of the request, else of the model; None if neither forces one."""
    own, model = getattr(params, name), getattr(limits, name)
    if name == "forced_eos_token_id" and params.structured_outputs is not None:
        return None  # an output that is cut short must not look complete
    token = model if own is None else own
    if token is None or token < 0:
        return None
    _check_in_vocabulary(name, (token,), limits.vocab_size)
    return token


def params_per_prompt(params: Any, count: int) -> list[SamplingParams]:
    """Return one `SamplingParams` per prompt: a single one is repeated, a list must have `count` entries.

    Raises:
        TypeError: `params` or one of its entries is not a SamplingParams.
        ValueError: a list of the wrong length.
    """
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, (list, tuple)):
        raise TypeError(f"sampling_params must be a SamplingParams or a list of them, got {describe(params)}.")
    if len(params) != count:
        raise ValueError(
            f"sampling_params has {len(params)} entries for {count} prompts: pass one for all, or one a prompt."
        )
    for index, entry in enumerate(params):
        if not isinstance(entry, SamplingParams):
            raise TypeError(f"sampling_params[{index}] must be a SamplingParams, got {describe(entry)}.")
    return list(params)


def _check_in_vocabulary(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if token >= vocab_size:
            raise ValueError(
                f"{name} contains {token}, outside the vocabulary: ids run from 0 to "
                f"{vocab_size - 1} (vocab_size={vocab_size})."
            )


def _encode_bad_words(
    params: SamplingParams, limits: ModelLimits, encode: Callable[[str], Sequence[int]] | None
) -> tuple[tuple[int, ...], ...]:
    if not params.bad_words:
        return ()
    if encode is None:
        raise ValueError("bad_words needs the tokenizer: load the model with one, or use logit_bias.")
    sequences: dict[tuple[int, ...], None] = {}
    for word in params.bad_words:
        # A word is tokenised differently at the start of a text and after a space: ban both.
        for spelling in (word, " " + word.lstrip()):
            ids = tuple(int(token) for token in encode(spelling))
            _check_in_vocabulary("bad_words", ids, limits.vocab_size)
            if ids:
                sequences[ids] = None
    return tuple(sequences)


def _check_something_left(params: SamplingParams, usable: int) -> None:
    """Raise ValueError if the parameters mask every token of the vocabulary."""
    masked = {ids[0] for ids in params.bad_words_token_ids + params.bad_words_ids if len(ids) == 1}
    if params.min_tokens > 0:
        masked |= params.all_stop_token_ids
    if params.allowed_token_ids is None:
        left = usable - sum(token < usable for token in masked)
    else:
        left = sum(token < usable and token not in masked for token in params.allowed_token_ids)
    if left == 0:
        raise ValueError(
            "every token is masked: allowed_token_ids, bad_words (bad_words_ids) and "
            f"min_tokens={params.min_tokens} leave none of the {usable} that can be sampled."
        )
