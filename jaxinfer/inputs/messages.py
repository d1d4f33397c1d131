"""Normalise chat messages to the forms that chat templates accept, as vLLM does.

Clients send messages in several forms: content as text, as parts, as None or, for tool results, as an object; tool-call
arguments as objects or as a JSON string; messages as dicts or as objects of a client library. This module converts all
of them to plain data and never modifies the caller's objects.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from jaxinfer._utils.checks import describe
from jaxinfer.inputs.message_parts import content_of
from jaxinfer.inputs.plain_data import fields_of, is_list, plain

log = logging.getLogger(__name__)


def conversations(messages: Any, *, images: bool) -> tuple[list[list[dict[str, Any]]], bool]:
    """Check messages and convert them to plain data.

    Args:
        messages: dicts with "role" and "content", objects with `model_dump` or dataclasses, or a list of such lists.
        images: whether the model takes images in messages.

    Returns:
        The messages of each conversation, with content as a string, a list of parts or, for tool results, an object;
        and whether `messages` is a list of conversations. Image parts keep the caller's object under "image".

    Raises:
        TypeError, ValueError: a message is invalid; the error names its index.
    """
    several = is_several(messages)
    try:
        return [
            _conversation(chat, f"messages[{index}]" if several else "messages", images)
            for index, chat in enumerate(messages if several else [messages])
        ], several
    except RecursionError:
        raise ValueError("messages are nested too deeply, or contain themselves.") from None


def images_of(chat: list[dict[str, Any]]) -> list[Any]:
    """Return the images of a conversation from `conversations`, in order."""
    contents = [message["content"] for message in chat if isinstance(message["content"], list)]
    return [part["image"] for content in contents for part in content if part["type"] == "image"]


def is_several(messages: Any) -> bool:
    """Return whether `messages` is a list of conversations, not a single conversation."""
    return is_list(messages) and len(messages) > 0 and all(is_list(item) for item in messages)


def _conversation(messages: Any, where: str, images: bool) -> list[dict[str, Any]]:
    if not is_list(messages):
        raise TypeError(f"{where} must be a list of dicts with 'role' and 'content', got {describe(messages)}.")
    if not messages:
        raise ValueError(f"{where} cannot be empty: a conversation needs a message.")
    return [_message(message, f"{where}[{index}]", images) for index, message in enumerate(messages)]


def _message(message: Any, where: str, images: bool) -> dict[str, Any]:
    fields = fields_of(message)
    if fields is None:
        raise TypeError(f"{where} must be a dict with 'role' and 'content', got {describe(message)}.")
    role = fields.get("role")
    if not isinstance(role, str):
        raise TypeError(f"{where}['role'] must be a string, got {describe(role)}.")
    made = {key: value for key, value in fields.items() if value is not None and key != "content"}
    _add_calls(made, where)
    if made.get("reasoning") is not None:
        made.setdefault("reasoning_content", made["reasoning"])
    content = fields.get("content")
    if content is None and ("content" in fields or made.keys() > {"role"}):
        content = made.get("refusal", "")
    return {**plain(made), "content": content_of(content, role, f"{where}['content']", images)}


def _add_calls(made: dict[str, Any], where: str) -> None:
    """Normalise the tool calls of a message in place to a list of dicts with parsed arguments."""
    legacy = made.get("function_call")
    if legacy is not None and not made.get("tool_calls"):
        made["tool_calls"] = [{"type": "function", "function": legacy}]
    calls = made.pop("tool_calls", None)
    if calls is None:
        return
    if not is_list(calls):
        raise TypeError(f"{where}['tool_calls'] must be a list of tool calls, got {describe(calls)}.")
    if calls:
        made["tool_calls"] = [_call(call, f"{where}['tool_calls'][{index}]") for index, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    fields = fields_of(call)
    if fields is None:
        raise TypeError(f"{where} must be a dict with 'function', got {describe(call)}.")
    made = {key: value for key, value in fields.items() if value is not None}
    if "function" not in made:
        return _with_arguments(made, where) if "arguments" in made else made
    function = fields_of(made["function"])
    if function is None:
        raise TypeError(f"{where}['function'] must be a dict with 'name', got {describe(made['function'])}.")
    return {**made, "function": _with_arguments(function, f"{where}['function']")}


def _with_arguments(function: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Return a function with its arguments as an object; null and invalid JSON, which models do write, become {}."""
    given = function.get("arguments")
    if not isinstance(given, str):
        values = given if is_list(given) else fields_of(given)
        if values is None and given is not None:
            raise TypeError(f"{where}['arguments'] must be an object or JSON in a string, got {describe(given)}.")
        return {**function, "arguments": values or {}}
    try:
        values = json.loads(given)
    except ValueError as error:
        if given.strip():
            log.warning("%s['arguments'] is not JSON (%s): taken as {}.", where, error)
        values = None
    return {**function, "arguments": {} if values is None else values}
