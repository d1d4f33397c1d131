"""Split the text of an answer into content, reasoning and tool calls, with the tokenizer's response template.

The parser is transformers' (`transformers.utils.chat_parsing`). Without a response template all text is content.
"""

import json
import uuid
from collections.abc import Sequence
from typing import Any

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the field for reasoning in response templates."""
CALLS = "tool_calls"


def has_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a response template, which says how its model's answers are parsed."""
    return getattr(tokenizer, "response_template", None) is not None


class AnswerParser:
    """Parser of one sample; its deltas add up to the message.

    Args:
        tokenizer: transformers tokenizer.
        prompt: rendered prompt, which may contain the beginning of the answer.
        tools: tools of the request, whose schemas give the types of arguments.
    """

    def __init__(self, tokenizer: Any, prompt: str | None, tools: Sequence[Any] | None):
        self.calls = 0
        """Number of tool calls so far."""
        self._parser = None
        if has_template(tokenizer) and prompt is not None:
            from transformers.utils.chat_parsing import ResponseParser

            self._parser = ResponseParser(tokenizer.response_template, prefix=prompt, tools=list(tools or ()))
        self._raw: list[str] = []
        """Text of the region that is open, which becomes content if it cannot be parsed."""

    def push(self, text: str, *, last: bool = False) -> list[dict[str, Any]]:
        """Return the deltas of new text, each with one of the fields `content`, `reasoning_content`, `tool_calls`.

        `last`: whether the answer is complete.
        """
        if self._parser is None:
            return [{"content": text}] if text else []
        try:
            events = self._parser.feed(text)
            if last:
                events = events + self._parser.finalize()[1]
        except ValueError:  # what the model wrote does not have the form of its template
            self._parser = None
            return [{"content": "".join(self._raw) + text}]
        return [delta for event in events if (delta := self._delta(event)) is not None]

    def _delta(self, event: dict[str, Any]) -> dict[str, Any] | None:
        field, kind = event["field"], event["type"]
        if kind == "region_open":
            self._raw.clear()
            return None
        if field == CALLS:
            if kind == "region_chunk":
                self._raw.append(event["text"])
                return None
            self._raw.clear()
            return {CALLS: [self._call(call) for call in _calls(event["value"])]}
        if kind != "region_chunk":
            return None
        if field in REASONING:
            return {"reasoning_content": event["text"]}
        return {"content": event["text"]} if field == "content" else None

    def _call(self, call: Any) -> dict[str, Any]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        arguments = function.get("arguments", {})
        index, self.calls = self.calls, self.calls + 1
        return {
            "index": index,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {
                "name": str(function.get("name", "")),
                "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
            },
        }


def _calls(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def message_of(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the deltas of an answer to the assistant's message."""
    content = "".join(delta.get("content", "") for delta in deltas)
    reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
    calls = [call for delta in deltas for call in delta.get(CALLS, ())]
    made: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    if reasoning:
        made["reasoning_content"] = reasoning
    if calls:
        made[CALLS] = [{key: value for key, value in call.items() if key != "index"} for call in calls]
    return made
