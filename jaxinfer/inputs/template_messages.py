"""Convert normalised chat messages to the forms of content that a chat template accepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxinfer.inputs.message_parts import TOOL_ROLES
from jaxinfer.inputs.plain_data import as_json

ContentForms = Callable[[str], str]
"""Function from a role to the content forms that a template accepts for it: letters of `template_worker.describe`."""


def for_template(chat: list[dict[str, Any]], forms: ContentForms, image_marker: str | None) -> list[dict[str, Any]]:
    """Convert the contents of a conversation to the forms that a template accepts.

    Args:
        chat: messages from `conversations`.
        forms: returns the content forms that the template accepts for a role.
        image_marker: text inserted for each image if the template does not handle images.
    """
    return [_for_template(message, forms(message["role"]), image_marker) for message in chat]


def _for_template(message: dict[str, Any], forms: str, image_marker: str | None) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, Mapping) and "o" not in forms:
        content = as_json(content)
    if isinstance(content, str):
        if "p" in forms and "s" not in forms:
            content = [{"type": "text", "text": content}] if content else []
    elif isinstance(content, list):
        if _keeps_parts(message["role"], content, forms):
            content = [{"type": "image"} if part["type"] == "image" else dict(part) for part in content]
        else:
            content = "\n".join(image_marker or "" if part["type"] == "image" else part["text"] for part in content)
    made = {**message, "content": content}
    if "j" in forms and "tool_calls" in made:
        made["tool_calls"] = [_with_json(call) for call in made["tool_calls"]]
    return made


def _keeps_parts(role: str, content: list[dict[str, Any]], forms: str) -> bool:
    """Return whether the template gets a list of parts instead of joined text.

    Tool results are joined to text for every template that accepts text there, as in vLLM.
    """
    if any(part["type"] == "image" for part in content):
        return "i" in forms
    return "p" in forms and (role not in TOOL_ROLES or "s" not in forms)


def _with_json(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as a JSON string."""
    if "function" in call:
        return {**call, "function": _with_json(call["function"])}
    return {**call, "arguments": as_json(call["arguments"])} if "arguments" in call else call
