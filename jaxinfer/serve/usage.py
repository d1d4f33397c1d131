"""Usage, finish reasons and log-probabilities in OpenAI's forms."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxinfer.outputs import CompletionOutput, Logprob, RequestOutput

LOWEST = -9999.0
"""Log-probability of a token with probability 0: JSON has no infinities."""


class Usage:
    """Token counts of a response."""

    def __init__(self) -> None:
        self.prompt = self.cached = self.completion = 0

    @classmethod
    def of(cls, outputs: Iterable[RequestOutput]) -> "Usage":
        """Count the tokens of whole outputs."""
        made = cls()
        for output in outputs:
            made.add_prompt(output)
            made.add(output)
        return made

    def add_prompt(self, output: RequestOutput) -> None:
        """Count a prompt."""
        self.prompt += len(output.prompt_token_ids)
        self.cached += output.num_cached_tokens

    def add(self, output: RequestOutput) -> None:
        """Count the tokens of an output or a delta."""
        self.completion += sum(len(sample.token_ids) for sample in output.outputs)

    def as_json(self) -> dict[str, Any]:
        """Return the `usage` of a response."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def finish_reason(sample: CompletionOutput, *, calls: bool = False) -> str | None:
    """Return a sample's finish reason; `calls`: whether it has called tools."""
    return "tool_calls" if calls and sample.finish_reason == "stop" else sample.finish_reason


def _number(entry: Logprob) -> float:
    return max(entry.logprob, LOWEST)


def _token(entry: Logprob) -> dict[str, Any]:
    text = entry.decoded_token or ""
    return {"token": text, "logprob": _number(entry), "bytes": list(text.encode("utf-8", "replace"))}


def _most_likely(table: Mapping[int, Logprob], count: int) -> list[Logprob]:
    return sorted(table.values(), key=lambda entry: -entry.logprob)[:count]


def chat_logprobs(sample: CompletionOutput, top: int) -> dict[str, Any] | None:
    """Return `logprobs` of a chat completion; `top`: most likely tokens at each position."""
    if sample.logprobs is None:
        return None
    content = []
    for token, table in zip(sample.token_ids, sample.logprobs, strict=True):
        content.append(_token(table[token]) | {"top_logprobs": [_token(one) for one in _most_likely(table, top)]})
    return {"content": content, "refusal": None}


def completion_logprobs(sample: CompletionOutput, top: int, start: int = 0) -> dict[str, Any] | None:
    """Return `logprobs` of a completion.

    Args:
        sample: whole output or delta.
        top: most likely tokens at each position.
        start: characters of the text before this delta.
    """
    if sample.logprobs is None:
        return None
    tokens, numbers, tops, offsets = [], [], [], []
    for token, table in zip(sample.token_ids, sample.logprobs, strict=True):
        offsets.append(start)
        tokens.append(table[token].decoded_token or "")
        start += len(tokens[-1])
        numbers.append(_number(table[token]))
        tops.append({one.decoded_token or "": _number(one) for one in _most_likely(table, top)} if top else None)
    return {"tokens": tokens, "token_logprobs": numbers, "top_logprobs": tops, "text_offset": offsets}


def first_of(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Return the only output."""
    [output] = outputs
    return output
