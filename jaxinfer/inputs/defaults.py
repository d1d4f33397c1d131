"""Sampling parameters against a model: the second check, once vocabulary and lengths are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxinfer._utils.checks import describe
from jaxinfer.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class ModelLimits:
    """What a model allows, for `resolve`."""

    vocab_size: int
    """Rows of the output layer, V."""
    max_model_len: int
    """Most tokens of a sequence, prompt and output together."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end an output unless `ignore_eos`."""
    forced_bos_token_id: int | None = None
    """The token that comes first after a prompt of one token; None: any may."""
    forced_eos_token_id: int | None = None
    """The token that comes last where an output reaches its greatest length."""
    tokenizer_len: int | None = None
    """One more than the highest id the tokenizer knows; ids from there on are padding, never sampled."""
    longer: str = ""
    """What limits `max_model_len` and how to raise it, for errors (`length_remedy`)."""

    @property
    def usable(self) -> int:
        """Token ids below this can be sampled."""
        return self.vocab_size if self.tokenizer_len is None else min(self.vocab_size, self.tokenizer_len)


def length_remedy(max_model_len: int, asked: int | None, allowed: int, *, contiguous: bool = False) -> str:
    """Say what limits the length of a sequence and how to raise it, as the end of a sentence that says to shorten it.

    Args:
        max_model_len: the most tokens of a sequence.
        asked: the setting `max_model_len`; None: it was not set.
        allowed: tokens that the model allows.
        contiguous: whether the rows of the cache, and not a pool of blocks, hold them.
    """
    if max_model_len >= allowed:
        return ": the model allows no more (max_position_embeddings)"
    if asked is not None:
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
    """Check `params` against the model and fill in what depends on it.

    The result has `max_tokens` set (clamped to what the model's length leaves after the prompt), `top_k`
    within the vocabulary, `bad_words_token_ids` and `eos_token_ids` complete. `params` must not be a result
    of `resolve`.

    Args:
        params: as the user made them.
        limits: of the model.
        prompt_len: tokens of the prompt, less than `limits.max_model_len`.
        encode: text to token ids without special tokens; needed for `bad_words` only.

    Raises:
        ValueError: a token id outside the vocabulary, every token masked, `min_tokens` beyond what fits.
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
            f"got {params.min_tokens}. Lower it{limits.longer}."
        )
    # A checkpoint may name an EOS that its output layer does not have; it cannot come.
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
    """The request's own, else the model's; None for none."""
    own, model = getattr(params, name), getattr(limits, name)
    token = model if own is None else own
    if token is None or token < 0:
        return None
    _check_in_vocabulary(name, (token,), limits.vocab_size)
    return token


def spread(params: Any, count: int) -> list[SamplingParams]:
    """One `SamplingParams` a prompt: `params` repeated, or the list itself, which must have `count` entries.

    Raises:
        TypeError: something else than SamplingParams.
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
        # A word has other tokens at the start of a text than after a space; both spellings are banned.
        for spelling in (word, " " + word.lstrip()):
            ids = tuple(int(token) for token in encode(spelling))
            _check_in_vocabulary("bad_words", ids, limits.vocab_size)
            if ids:
                sequences[ids] = None
    return tuple(sequences)


def _check_something_left(params: SamplingParams, usable: int) -> None:
    """Refuse params under which no token could ever be chosen."""
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
