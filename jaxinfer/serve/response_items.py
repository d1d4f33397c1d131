"""Output items of OpenAI's responses, and the events that announce them in a stream."""

from typing import Any

from jaxinfer.serve.context import new_id
from jaxinfer.serve.parsing import CALLS

TEXT, REASONING = "output_text", "reasoning_text"
"""Types of the parts of messages and of reasoning."""


def _part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text} | ({"annotations": [], "logprobs": []} if kind == TEXT else {})


def _item(kind: str, name: str, text: str | None) -> dict[str, Any]:
    """Return a message or reasoning item; its text is None while it is in progress."""
    content = [] if text is None else [_part(kind, text)]
    if kind == REASONING:
        return {"type": "reasoning", "id": name, "summary": [], "content": content}
    status = "in_progress" if text is None else "completed"
    return {"type": "message", "id": name, "role": "assistant", "status": status, "content": content}


def _call(call: dict[str, Any], name: str, *, done: bool) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": name,
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"] if done else "",
        "status": "completed" if done else "in_progress",
    }


def items_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the items of a whole answer, from the message that `parsing.message_of` makes."""
    found = []
    if message.get("reasoning_content"):
        found.append(_item(REASONING, new_id("rs"), message["reasoning_content"]))
    if message["content"] or not message.get(CALLS):
        found.append(_item(TEXT, new_id("msg"), message["content"] or ""))
    return found + [_call(call, new_id("fc"), done=True) for call in message.get(CALLS, ())]


class Items:
    """Items of a streamed answer: one is added at the first delta of a kind, and is done at the next kind."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        """Complete items."""
        self._kind, self._name = "", ""
        self._text: list[str] = []

    def add(self, delta: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the events of a delta of `AnswerParser`."""
        if CALLS in delta:
            return [one for call in delta[CALLS] for one in self._calls(call)]
        kind = REASONING if "reasoning_content" in delta else TEXT
        text = delta["reasoning_content" if kind == REASONING else "content"]
        events = [] if kind == self._kind else self.close() + self._begin(kind)
        self._text.append(text)
        return [*events, self._of_part(f"response.{kind}.delta", delta=text) | self._logprobs()]

    def _begin(self, kind: str) -> list[dict[str, Any]]:
        self._kind, self._name, self._text = kind, new_id("rs" if kind == REASONING else "msg"), []
        added = self._of_item("response.output_item.added", _item(kind, self._name, None))
        return [added, self._of_part("response.content_part.added", part=_part(kind, ""))]

    def close(self) -> list[dict[str, Any]]:
        """Return the events that complete the open item, if one is open."""
        if not self._kind:
            return []
        kind, text = self._kind, "".join(self._text)
        item = _item(kind, self._name, text)
        events = [
            self._of_part(f"response.{kind}.done", text=text) | self._logprobs(),
            self._of_part("response.content_part.done", part=_part(kind, text)),
            self._of_item("response.output_item.done", item),
        ]
        self.done.append(item)
        self._kind = ""
        return events

    def _calls(self, call: dict[str, Any]) -> list[dict[str, Any]]:
        events, self._name = self.close(), new_id("fc")
        item, place = _call(call, self._name, done=True), {"item_id": self._name, "output_index": len(self.done)}
        head = "response.function_call_arguments"
        events += [
            self._of_item("response.output_item.added", _call(call, self._name, done=False)),
            {"type": f"{head}.delta", "delta": item["arguments"]} | place,
            {"type": f"{head}.done", "arguments": item["arguments"], "name": item["name"]} | place,
            self._of_item("response.output_item.done", item),
        ]
        self.done.append(item)
        return events

    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self._kind == TEXT else {}

    def _of_item(self, kind: str, item: dict[str, Any]) -> dict[str, Any]:
        return {"type": kind, "output_index": len(self.done), "item": item}

    def _of_part(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": self._name, "output_index": len(self.done), "content_index": 0} | more
