"""What a request gives back. All plain data; in a notebook, texts show coloured by log-probability."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Logprob:
    """One candidate token at one position."""

    logprob: float
    """Natural logarithm of its probability."""
    rank: int | None = None
    """1 for the likeliest token of the vocabulary."""
    decoded_token: str | None = None
    """The text that it adds to the text before it; None without a tokenizer.

    Those of the tokens of an output join to its text: a token that does not finish a character has an empty string, and
        so
    have a special token that the text leaves out and the token that ends the output. Tokens of a stop string keep
    theirs. Other candidates, and the tokens of a prompt, have theirs even where they are special.
    """


@dataclass(frozen=True)
class KindHit:
    """What the layers of one kind could have served of a prompt by themselves; the hit is what all of them can."""

    kind: str
    """"full", "sliding(W)" of layers with a window of W positions, or "recurrent" of layers with a state."""
    tokens: int
    """Prompt tokens."""
    reason: str
    """Why no more."""


@dataclass(frozen=True)
class RequestMetrics:
    """When what happened to a request. Times are seconds of `time.monotonic`; None: it has not happened."""

    arrival_time: float
    """Handed to the engine."""
    first_scheduled_time: float | None = None
    """First in a step."""
    first_token_time: float | None = None
    """First token known to the host."""
    finished_time: float | None = None
    """Last sample finished."""
    num_preemptions: int = 0
    """Times its blocks were taken for another request, to be recomputed."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    cache_miss_reason: str | None = None
    """Why no more of the prompt was found there: "below one block", "absent", "evicted under pressure", "window
    evicted", "no snapshot at that boundary", "salt differs", "collision" or "complete"."""
    cache_hits: tuple[KindHit, ...] = ()
    """The same for each kind of layer."""
    clamped_max_tokens: int | None = None
    """Most new tokens a sample could have, where the cache holds fewer than `max_tokens` asks for; None: no fewer."""


@dataclass(frozen=True, repr=False)
class CompletionOutput:
    """One sample of a request."""

    index: int
    """0 to n - 1."""
    text: str
    """What its tokens add to the text of the prompt: all of it, or what is new when streaming deltas."""
    token_ids: Sequence[int]
    """Its tokens, those of EOS and stop strings included."""
    cumulative_logprob: float | None = None
    """Sum of the log-probabilities of its tokens; None unless logprobs were asked for."""
    logprobs: Sequence[Mapping[int, Logprob]] | None = None
    """For each token, the likeliest candidates and the chosen one by token id."""
    finish_reason: FinishReason | None = None
    """"stop", "length", "abort", "error"; None while it runs."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for EOS and everything else."""
    score: float | None = None
    """Of a beam search: `cumulative_logprob` over the number of tokens to the power of the length penalty."""

    @property
    def finished(self) -> bool:
        """Whether no more will come."""
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
    """A request's prompt and its samples so far."""

    request_id: str
    """Unique among the engine's requests."""
    prompt: str | None
    """The prompt's text; None when it came as token ids."""
    prompt_token_ids: Sequence[int]
    """The prompt's tokens."""
    outputs: Sequence[CompletionOutput]
    """One entry a sample, by index."""
    finished: bool
    """Whether every sample has finished."""
    prompt_logprobs: Sequence[Mapping[int, Logprob] | None] | None = None
    """For each prompt token, as `CompletionOutput.logprobs`; the first is None, nothing comes before it."""
    metrics: RequestMetrics | None = None
    """Times and cache use."""
    encoder_prompt: str | None = None
    """The encoder's prompt of an encoder-decoder model."""
    encoder_prompt_token_ids: Sequence[int] | None = None
    """Its tokens."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""

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
        return f"<div>{_small(head)}{_block(body, colour='#777')}{samples}</div>"


def _short(text: str | None, most: int = 60) -> str:
    if text is None:
        return "None"
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text)} characters)"


def _small(head: str) -> str:
    return f"<div style='font-size:85%;color:#777'>{head}</div>"


def _block(body: str, colour: str = "inherit") -> str:
    style = f"white-space:pre-wrap;font-family:monospace;margin:2px 0 8px 0;color:{colour}"
    return f"<div style='{style}'>{body}</div>"


def _coloured(token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob] | None]) -> str:
    """Every token in a box from red (unlikely) to green (certain), its candidates in the tooltip."""
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
