"""Log-likelihoods of continuations, and sampling parameters of evaluations, for `jaxinfer.integrations.lm_eval`."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from jaxinfer.llm import LLM
from jaxinfer.outputs import RequestOutput
from jaxinfer.sampling_params import SamplingParams

OWN = ("output_kind", "logprobs", "prompt_logprobs", "n", "detokenize", "stop", "max_tokens")
"""Sampling parameters that an evaluation cannot set."""


class Score(NamedTuple):
    """Log-likelihood of a continuation."""

    logprob: float
    """Sum of the log-probabilities of its tokens."""
    greedy: bool
    """Whether each of its tokens is the most likely one."""


def score(llm: LLM, pairs: Sequence[tuple[list[int], list[int]]], max_length: int) -> list[Score]:
    """Score continuations.

    Args:
        llm: model.
        pairs: token ids of each context, of which there is at least one, and of its continuation. Where both together
            have more than `max_length + 1`, the context is cut off at the left, so that the model sees `max_length`
            tokens before the last one that it scores.
        max_length: most tokens that the model is to see.

    Raises:
        ValueError: a context or continuation is empty, or a continuation has more than `max_length` tokens.
    """
    for context, continuation in pairs:
        if not context or not continuation:
            raise ValueError(
                f"a context and its continuation must have at least one token each, got {len(context)} and "
                f"{len(continuation)}"
            )
        if len(continuation) > max_length:
            raise ValueError(f"a continuation has {len(continuation)} tokens, and max_length is {max_length}")
    if not pairs:
        return []
    prompts = [context[-(max_length + 1 - len(continuation)) :] for context, continuation in pairs]
    outputs = llm.score([{"prompt_token_ids": prompt} for prompt in prompts], [own for _, own in pairs], use_tqdm=False)
    return [Score(output.cumulative_logprob, all(rank == 1 for rank in output.ranks)) for output in outputs]


def check(output: RequestOutput) -> None:
    """Raise RuntimeError if a request failed: an evaluation must not count half an answer."""
    for sample in output.outputs:
        if sample.finish_reason in ("error", "abort"):
            raise RuntimeError(f"request {output.request_id} ended with {sample.finish_reason}: {sample.stop_reason}")


def sampling_params(options: Mapping[str, Any], stop: Sequence[str], max_tokens: int) -> SamplingParams:
    """Return the parameters of a task's generation.

    Args:
        options: names and values of the task, those of `SamplingParams`; `do_sample=False` is greedy.
        stop: texts that end an answer.
        max_tokens: most new tokens.

    Raises:
        ValueError: an option is not one of `SamplingParams`.
    """
    given = dict(options)
    sampled = given.pop("do_sample", None)
    known = {one.name for one in fields(SamplingParams)} - set(OWN)
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"generation_kwargs has {unknown[0]!r}, which jaxinfer does not know; it takes until, max_gen_toks, "
            f"do_sample, {', '.join(sorted(known))}"
        )
    temperature = given.pop("temperature", 1.0 if sampled else 0.0)
    if sampled is False:
        temperature = 0.0
    return SamplingParams(temperature=temperature, stop=list(stop), max_tokens=max_tokens, **given)
