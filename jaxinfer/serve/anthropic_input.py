"""Convert the messages and tools of Anthropic's API to OpenAI's forms, which chat templates know."""

import json
from collections.abc import Mapping
from typing import Any

from jaxinfer._utils.checks import describe
from jaxinfer.serve.errors import APIError, wrong_type

HIDDEN = ("redacted_thinking",)
"""Blocks that only Anthropic's models can read."""


def conversation(system: Any, messages: list[Any]) -> list[dict[str, Any]]:
    """Return the messages of a request, with the system prompt as the first of them."""
    found = []
    if system is not None:
        found.append({"role": "system", "content": _text(system, "system")})
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "system"):
            raise wrong_type(where, "an object with the role 'user' or 'assistant' and content", message)
        content = message.get("content")
        if isinstance(content, str):
            found.append({"role": message["role"], "content": content})
        elif message["role"] == "assistant":
            found.append(_answer(_blocks(content, f"{where}.content"), where))
        else:
            found += _question(_blocks(content, f"{where}.content"), message["role"], where)
    return found


def tools(values: list[Any] | None) -> list[dict[str, Any]] | None:
    """Return the tools of a request."""
    made = []
    for index, tool in enumerate(values or ()):
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise wrong_type(f"tools[{index}]", "an object with a name and an input_schema", tool)
        if not isinstance(tool.get("input_schema"), dict):
            raise APIError(
                f"tools[{index}] {tool['name'][:100]!r} has no input_schema: only tools that the client runs are "
                "supported.",
                param="tools",
            )
        function = {"name": tool["name"], "parameters": tool["input_schema"]}
        if isinstance(tool.get("description"), str):
            function["description"] = tool["description"]
        made.append({"type": "function", "function": function})
    return made or None


def _blocks(content: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(content, list):
        raise wrong_type(where, "a string or a list of content blocks", content)
    for index, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise wrong_type(f"{where}[{index}]", "a content block with a type", block)
    return content


def _text(content: Any, where: str) -> str:
    """Return the text of a string or of text blocks."""
    if isinstance(content, str):
        return content
    return "\n".join(_field(block, "text", where) for block in _blocks(content, where))


def _field(block: Mapping[str, Any], name: str, where: str) -> str:
    if isinstance(block.get(name), str):
        return block[name]
    if block["type"] in ("text", "thinking", "tool_use"):
        kind, value = block["type"], describe(block.get(name))
        raise APIError(f"{where}: {name} of a block of type {kind} must be a string, got {value}.", param="messages")
    raise APIError(f"{where} has a block of type {describe(block['type'])} where text belongs.", param="messages")


def _answer(blocks: list[Mapping[str, Any]], where: str) -> dict[str, Any]:
    made: dict[str, Any] = {"role": "assistant", "content": ""}
    calls = []
    for block in blocks:
        if block["type"] == "tool_use":
            function = {"name": _field(block, "name", where), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif block["type"] == "thinking":
            made["reasoning_content"] = made.get("reasoning_content", "") + _field(block, "thinking", where)
        elif block["type"] not in HIDDEN:
            made["content"] += _field(block, "text", where)
    return made | ({"tool_calls": calls} if calls else {})


def _question(blocks: list[Mapping[str, Any]], role: str, where: str) -> list[dict[str, Any]]:
    """Return the messages of a user's turn: results of tools, each a message of its own, then the rest."""
    results, parts = [], []
    if not blocks:
        raise APIError(f"{where}.content must have at least one content block.", param="messages")
    for block in blocks:
        if block["type"] == "tool_result":
            content = block.get("content")
            text = "" if content is None else _text(content, f"{where}.content")
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        elif block["type"] == "image":
            parts.append({"type": "image_url", "image_url": {"url": _data_url(block.get("source"), where)}})
        else:
            parts.append({"type": "text", "text": _field(block, "text", where)})
    if parts and all(part["type"] == "text" for part in parts):
        parts = "\n".join(part["text"] for part in parts)
    return results + ([{"role": role, "content": parts}] if parts else [])


def _data_url(source: Any, where: str) -> str:
    if not isinstance(source, dict) or source.get("type") != "base64":
        raise APIError(
            f"{where}: images must be of source type 'base64'; this server fetches no URLs.", param="messages"
        )
    return f"data:{source.get('media_type')};base64,{source.get('data')}"


def arguments(text: str) -> Any:
    """Return the arguments of a tool call as an object."""
    try:
        return json.loads(text)
    except ValueError:
        return {}
