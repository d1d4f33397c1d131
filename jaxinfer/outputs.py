"""Outputs of requests, as plain data; in notebooks, text is coloured by log-probability."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxinfer._utils.html import element, table

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a candidate token at one position."""

    logprob: float
    """Natural logarithm of the token's probability, or the value that `EngineConfig.logprobs_mode` selects."""
    rank: int | None = None
    """Rank in the vocabulary, 1 for the most likely token."""
    decoded_token: str | None = None
    """Text that the token adds to the preceding text; None without a tokenizer.

    The decoded tokens of an output join to its text: a token that does not complete a character has an empty string,
    and so have special tokens left out of the text and the token that ends the output. Tokens of a stop string keep
    their text. Other candidates, and prompt tokens, have their text even if they are special.
    """


@dataclass(frozen=True)
class CacheHit:
    """Longest prompt prefix that layers of one kind could reuse; the hit is the longest common to all kinds."""

    kind: str
    """"full", "sliding(W)" or "chunked(W)" for layers with a window of W positions, or "recurrent" for layers with a
    state."""
    tokens: int
    """Number of prompt tokens."""
    reason: str
    """Why no more tokens could be reused."""


@dataclass(frozen=True)
class RequestMetrics:
    """Timestamps and cache use of a request. Times are seconds of `time.monotonic`; None if not reached yet."""

    arrival_time: float
    """When the request was handed to the engine."""
    first_scheduled_time: float | None = None
    """When the request was first scheduled in a step."""
    first_token_time: float | None = None
    """When the host read the first token."""
    finished_time: float | None = None
    """When the last sample finished."""
    num_preemptions: int = 0
    """Number of preemptions, after each of which a sample is recomputed."""
    cached_tokens: int = 0
    """Number of prompt tokens found in the prefix cache."""
    cache_miss_reason: str | None = None
    """Why no more of the prompt was found in the prefix cache: "below one block", "absent", "evicted under
    pressure", "window evicted", "no snapshot at that boundary", "salt differs", "collision" or "complete".
    """
    cache_hits: tuple[CacheHit, ...] = ()
    """Longest reusable prefix for each kind of layer."""
    clamped_max_tokens: int | None = None
    """Maximum number of new tokens of a sample, if the cache holds fewer than `max_tokens`; else None."""


@dataclass(frozen=True)
class WeightSegment:
    """Output tokens that were computed with weights of one version."""

    version: int
    """Number of times that the weights had been replaced (`LLM.weight_version`)."""
    start: int
    """Index of the first token, in all of the output also when streaming deltas."""
    stop: int
    """Index after the last token."""


@dataclass(frozen=True, repr=False)
class CompletionOutput:
    """One sample of a request."""

    index: int
    """Index of the sample, 0 to n - 1."""
    text: str
    """Text that the output tokens add to the prompt's: all of it, or only the new part when streaming deltas."""
    token_ids: Sequence[int]
    """Output token ids, including EOS and the tokens of stop strings."""
    cumulative_logprob: float | None = None
    """Sum of the tokens' log-probabilities; None unless `logprobs` is set."""
    logprobs: Sequence[Mapping[int, Logprob]] | None = None
    """Per token, a dict of the most likely candidates and the chosen token, by token id."""
    finish_reason: FinishReason | None = None
    """"stop", "length", "abort" or "error"; None while the sample is running."""
    stop_reason: int | str | None = None
    """Stop token id or stop string that ended the sample; None for EOS and other reasons."""
    weight_segments: Sequence[WeightSegment] = ()
    """Which tokens so far were computed with weights of which version, in order; empty for beams."""
    routed_experts: np.ndarray | None = None
    """Experts of each token of prompt and output but the last, which no step has computed: `[tokens, L, k]` for L
    layers with experts; None without `return_routed_experts`.
    """
    score: float | None = None
    """Score of a beam: `cumulative_logprob` / number of tokens ** length penalty."""

    @property
    def finished(self) -> bool:
        """Whether the sample is complete."""
        return self.finish_reason is not None

    def __repr__(self) -> str:
        return (
            f"CompletionOutput(index={self.index}, text={_short(self.text)}, "
            f"{len(self.token_ids)} tokens, finish_reason={self.finish_reason!r}, "
            f"stop_reason={self.stop_reason!r})"
        )

    def _repr_html_(self) -> str:
        state = self.finish_reason or "running"
        if self.stop_reason is not None:
            state += f": {self.stop_reason!r}"
        head = f"sample {self.index} &middot; {len(self.token_ids)} tokens &middot; {html.escape(state)}"
        body = html.escape(self.text) if self.logprobs is None else _coloured(self.token_ids, self.logprobs)
        return f"<div>{_small(head)}{_block(body)}</div>"


@dataclass(frozen=True, repr=False)
class RequestOutput:
    """Prompt and samples of a request."""

    request_id: str
    """Id, unique among the engine's requests."""
    prompt: str | None
    """Text of the prompt; None if it was passed as token ids."""
    prompt_token_ids: Sequence[int]
    """Token ids of the prompt."""
    outputs: Sequence[CompletionOutput]
    """Samples of the request, by index."""
    finished: bool
    """Whether every sample has finished."""
    prompt_logprobs: Sequence[Mapping[int, Logprob] | None] | None = None
    """Per prompt token, as in `CompletionOutput.logprobs`; None for the first, which nothing precedes."""
    metrics: RequestMetrics | None = None
    """Timestamps and cache use."""
    encoder_prompt: str | None = None
    """Text of the encoder's prompt for an encoder-decoder model."""
    encoder_prompt_token_ids: Sequence[int] | None = None
    """Token ids of the encoder's prompt."""
    num_cached_tokens: int = 0
    """Number of prompt tokens whose keys and values came from the prefix cache."""

    def __repr__(self) -> str:
        return (
            f"RequestOutput(request_id={self.request_id!r}, prompt={_short(self.prompt)}, "
            f"{len(self.prompt_token_ids)} prompt tokens, {self.num_cached_tokens} cached, "
            f"finished={self.finished}, outputs=[{', '.join(map(repr, self.outputs))}])"
        )

    def _repr_html_(self) -> str:
        head = (
            f"request {html.escape(self.request_id)} &middot; {len(self.prompt_token_ids)} prompt tokens "
            f"({self.num_cached_tokens} cached)"
        )
        prompt = self.prompt if self.prompt is not None else " ".join(map(str, self.prompt_token_ids))
        if self.prompt_logprobs is None:
            body = html.escape(prompt)
        else:
            body = _coloured(self.prompt_token_ids, self.prompt_logprobs)
        samples = "".join(output._repr_html_() for output in self.outputs)
        return f"<div>{_small(head)}{_block(body, dim=True)}{samples}</div>"


class RequestOutputs(list):
    """List of `RequestOutput` that notebooks display as a table."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return RequestOutputs(found) if isinstance(index, slice) else found

    def __repr__(self) -> str:
        lines = [
            f"[{place}] {_short(_prompt(output), 50)} -> {', '.join(_short(s.text or _ids(s), 70) for s in samples)}"
            for place, output, samples in self._shown()
        ]
        more = [f"and {len(self) - SHOWN} more"] if len(self) > SHOWN else []
        return "\n".join([f"{len(self)} output{'' if len(self) == 1 else 's'}", *lines, *more])

    def _shown(self) -> Iterator[tuple[int, RequestOutput, Sequence[CompletionOutput]]]:
        for place, output in enumerate(self[:SHOWN]):
            yield place, output, output.outputs[:SHOWN_SAMPLES]

    def _repr_html_(self) -> str:
        rows = []
        for place, output, samples in self._shown():
            state = f"{len(output.prompt_token_ids)} tokens, {output.num_cached_tokens} cached"
            for number, sample in enumerate(samples):
                prompt = (place, _cut(_prompt(output)), state) if not number else ("", "", "")
                done = sample.finish_reason or "running"
                rows.append((*prompt, _cut(sample.text or _ids(sample)), f"{len(sample.token_ids)} tokens, {done}"))
            if len(output.outputs) > len(samples):
                rows.append(("", "", "", f"and {len(output.outputs) - len(samples)} more samples", ""))
        more = f'<p class="dim">and {len(self) - SHOWN} more outputs</p>' if len(self) > SHOWN else ""
        return element(table(["", "prompt", "", "output", ""], rows), more)


SHOWN, SHOWN_SAMPLES = 20, 8
"""Number of outputs of a list, and of samples of each, that are shown."""


def _prompt(output: RequestOutput) -> str:
    return " ".join(map(str, output.prompt_token_ids)) if output.prompt is None else output.prompt


def _ids(sample: CompletionOutput) -> str:
    return " ".join(map(str, sample.token_ids))


def _cut(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


@dataclass(frozen=True)
class ScoreOutput:
    """Log-probabilities of a given completion."""

    prompt_token_ids: Sequence[int]
    """Token ids of the prompt."""
    token_ids: Sequence[int]
    """Token ids of the completion."""
    logprobs: Sequence[float]
    """Log-probability of each token of the completion."""
    num_cached_tokens: int = 0
    """Number of prompt tokens whose keys and values came from the prefix cache."""
    ranks: Sequence[int] = ()
    """Rank of each token of the completion among all tokens; 1 is the most likely one."""

    @property
    def cumulative_logprob(self) -> float:
        """Sum of the log-probabilities."""
        return math.fsum(self.logprobs)


@dataclass(frozen=True)
class EmbeddingOutput:
    """Pooled hidden states of a prompt."""

    prompt_token_ids: Sequence[int]
    """Token ids of the prompt."""
    embedding: np.ndarray
    """float32 `[M]`."""
    num_cached_tokens: int = 0
    """Number of prompt tokens whose keys and values came from the prefix cache."""


@dataclass(frozen=True)
class HiddenStates:
    """Outputs of modules for the tokens of a prompt."""

    prompt_token_ids: Sequence[int]
    """Token ids of the prompt, `[T]`."""
    states: Mapping[str, np.ndarray]
    """By path: float32 `[T, M]`, or integers `[T, k]` of a router."""


def _short(text: str | None, most: int = 60) -> str:
    if text is None:
        return "None"
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text)} characters)"


def _small(head: str) -> str:
    return f"<div style='font-size:85%;opacity:.68'>{head}</div>"


def _block(body: str, *, dim: bool = False) -> str:
    style = f"white-space:pre-wrap;font-family:monospace;margin:2px 0 8px 0;opacity:{0.75 if dim else 1}"
    return f"<div style='{style}'>{body}</div>"


def _coloured(token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob] | None]) -> str:
    """Render tokens in boxes from red (unlikely) to green (certain), with their candidates in the tooltip."""
    spans = []
    for token, candidates in zip(token_ids, logprobs, strict=False):
        chosen = candidates.get(token) if candidates else None
        text = html.escape(_token_text(token, chosen))
        if chosen is None or candidates is None:
            spans.append(text)
            continue
        probability = math.exp(min(chosen.logprob, 0.0)) if not math.isnan(chosen.logprob) else 0.0
        style = f"background:hsl({round(120 * probability)},70%,85%);color:#111"
        spans.append(f"<span style='{style}' title='{_tooltip(candidates)}'>{text}</span>")
    return "".join(spans)


def _tooltip(candidates: Mapping[int, Logprob]) -> str:
    ordered = sorted(candidates.items(), key=lambda item: -item[1].logprob)
    lines = [f"{_token_text(token, entry)!r} {entry.logprob:.3f}" for token, entry in ordered]
    return html.escape("\n".join(lines), quote=True)


def _token_text(token: int, entry: Logprob | None) -> str:
    return f"[{token}]" if entry is None or entry.decoded_token is None else entry.decoded_token
