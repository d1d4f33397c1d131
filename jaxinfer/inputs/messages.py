"""Normalise chat messages to the forms that chat templates accept, as vLLM does.

Clients send messages in several forms: content as text, as parts, as None or, for tool results, as an object; tool-call
arguments as objects or as a JSON string; messages as dicts or as objects of a client library. This module converts all
of them to plain data and never modifies the caller's objects.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxinfer._utils.checks import describe

log = logging.getLogger(__name__)

_TOOL_ROLES = ("tool", "function")
_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""Text part types: type -> key of the text."""
_IMAGE_PARTS = {"image": "image", "image_pil": "image_pil", "image_url": "image_url", "input_image": "image_url"}
"""Image part types: type -> key of the image."""

ContentForms = Callable[[str], str]
"""Function from a role to the content forms that a template accepts for it: letters of `template_worker.describe`."""


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


def for_template(chat: list[dict[str, Any]], forms: ContentForms, image_marker: str | None) -> list[dict[str, Any]]:
    """Convert the contents of a conversation to the forms that a template accepts.

    Args:
        chat: messages from `conversations`.
        forms: returns the content forms that the template accepts for a role.
        image_marker: text inserted for each image if the template does not handle images.
    """
    return [_for_template(message, forms(message["role"]), image_marker) for message in chat]


def images_of(chat: list[dict[str, Any]]) -> list[Any]:
    """Return the images of a conversation from `conversations`, in order."""
    contents = [message["content"] for message in chat if isinstance(message["content"], list)]
    return [part["image"] for content in contents for part in content if part["type"] == "image"]


def is_several(messages: Any) -> bool:
    """Return whether `messages` is a list of conversations, not a single conversation."""
    return _is_list(messages) and len(messages) > 0 and all(_is_list(item) for item in messages)


def plain(value: Any) -> Any:
    """Convert a value to plain Python data; other objects become the name of their type, as in transformers.

    Templates are untrusted and must not get objects, whose methods they could call.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_key(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else [*map(plain, value)]
    if isinstance(value, np.generic):
        return plain(value.item())
    fields = _fields(value)
    return f"<{type(value).__name__}>" if fields is None else plain(fields)


def _key(key: Any) -> Any:
    """Convert a dict key to a JSON-compatible key; keys of other types become text."""
    return plain(key) if key is None or isinstance(key, (str, int, float)) else str(key)


def _fields(value: Any) -> Mapping[Any, Any] | None:
    """Return the fields of a dict, pydantic object or dataclass; None for other types."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, type):
        return None
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump()
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _conversation(messages: Any, where: str, images: bool) -> list[dict[str, Any]]:
    if not _is_list(messages):
        raise TypeError(f"{where} must be a list of dicts with 'role' and 'content', got {describe(messages)}.")
    if not messages:
        raise ValueError(f"{where} cannot be empty: a conversation needs a message.")
    return [_message(message, f"{where}[{index}]", images) for index, message in enumerate(messages)]


def _message(message: Any, where: str, images: bool) -> dict[str, Any]:
    fields = _fields(message)
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
    return {**plain(made), "content": _content(content, role, f"{where}['content']", images)}


def _content(content: Any, role: str, where: str, images: bool) -> Any:
    """Normalise the content of a message to a string, a list of parts, or the object that a tool returned."""
    if isinstance(content, str):
        return plain(content)
    parts = _is_list(content)
    if role in _TOOL_ROLES and content is not None:
        if parts and all(map(_is_part, content)):
            return _parts(content, where, images)
        return plain(content) if isinstance(content, Mapping) else _json(plain(content))
    if not parts:
        kinds = "text and image parts" if images else "text parts"
        raise TypeError(f"{where} must be a string or a list of {kinds}, got {describe(content)}.")
    return _parts(content, where, images)


def _is_part(value: Any) -> bool:
    """Return whether an item of a tool result is a message part, rather than the tool's own object with a "type"."""
    if isinstance(value, str):
        return True
    fields = _fields(value) or {}
    kind = fields.get("type")
    return isinstance(kind, str) and {**_TEXT_PARTS, **_IMAGE_PARTS}.get(kind, kind) in fields


def _parts(content: Any, where: str, images: bool) -> list[dict[str, Any]]:
    """Normalise the parts of a message; drop parts whose text is None, as vLLM does."""
    made = [_part(part, f"{where}[{index}]", images) for index, part in enumerate(content)]
    return [part for part in made if part is not None]


def _part(part: Any, where: str, images: bool) -> dict[str, Any] | None:
    """Normalise a part to a text part or an image part with the caller's image; None if its text is None."""
    if isinstance(part, str):
        return {"type": "text", "text": plain(part)}
    fields = _fields(part)
    if fields is None:
        raise TypeError(f"{where} must be a dict with 'type' and 'text', got {describe(part)}.")
    kind = fields.get("type")
    if kind in _TEXT_PARTS if isinstance(kind, str) else False:
        text = fields.get(_TEXT_PARTS[kind])
        if text is None and _TEXT_PARTS[kind] in fields:
            return None
        if not isinstance(text, str):
            raise TypeError(f"{where}[{_TEXT_PARTS[kind]!r}] must be a string, got {describe(text)}.")
        return {"type": "text", "text": plain(text)}
    if images and isinstance(kind, str) and kind in _IMAGE_PARTS:
        return {"type": "image", "image": _image(fields, kind, where)}
    takes = "text and images ({'type': 'image', 'image': ...})" if images else "text only"
    raise ValueError(f"{where} is of type {describe(kind)}: this model takes {takes}.")


def _image(fields: Mapping[Any, Any], kind: str, where: str) -> Any:
    """Return the image of a part: the caller's object, or a data URL as a string."""
    image = fields.get(_IMAGE_PARTS[kind])
    if kind in ("image_url", "input_image"):
        url = image.get("url") if isinstance(image, Mapping) else image
        if not isinstance(url, str) or not url.startswith("data:"):
            raise ValueError(
                f"{where} is of type {describe(kind)}: this model takes text and images "
                "({'type': 'image', 'image': a PIL image or a NumPy array}), and of URLs data URLs alone "
                f"(data:image/png;base64,...), got {describe(url)}."
            )
        return url
    if image is None:
        raise ValueError(
            f"{where} has no {_IMAGE_PARTS[kind]!r}: pass a PIL image or a NumPy array there; nothing is read from "
            "paths or URLs."
        )
    return image


def decoded(image: Any, where: str) -> Any:
    """Open the image of a data URL; any other image is returned unchanged.

    Raises:
        ValueError: the data URL is not in base64 or does not contain a readable image.
    """
    if not isinstance(image, str):
        return image
    from PIL import Image

    head, _, data = image.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it is not in base64")
        return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    except (ValueError, binascii.Error, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: the data URL cannot be read as an image: {error}.") from error


def _add_calls(made: dict[str, Any], where: str) -> None:
    """Normalise the tool calls of a message in place to a list of dicts with parsed arguments."""
    legacy = made.get("function_call")
    if legacy is not None and not made.get("tool_calls"):
        made["tool_calls"] = [{"type": "function", "function": legacy}]
    calls = made.pop("tool_calls", None)
    if calls is None:
        return
    if not _is_list(calls):
        raise TypeError(f"{where}['tool_calls'] must be a list of tool calls, got {describe(calls)}.")
    if calls:
        made["tool_calls"] = [_call(call, f"{where}['tool_calls'][{index}]") for index, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    fields = _fields(call)
    if fields is None:
        raise TypeError(f"{where} must be a dict with 'function', got {describe(call)}.")
    made = {key: value for key, value in fields.items() if value is not None}
    if "function" not in made:
        return _with_arguments(made, where) if "arguments" in made else made
    function = _fields(made["function"])
    if function is None:
        raise TypeError(f"{where}['function'] must be a dict with 'name', got {describe(made['function'])}.")
    return {**made, "function": _with_arguments(function, f"{where}['function']")}


def _with_arguments(function: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Return a function with its arguments as an object; null and invalid JSON, which models do write, become {}."""
    given = function.get("arguments")
    if not isinstance(given, str):
        values = given if _is_list(given) else _fields(given)
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


def _for_template(message: dict[str, Any], forms: str, image_marker: str | None) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, Mapping) and "o" not in forms:
        content = _json(content)
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
    return "p" in forms and (role not in _TOOL_ROLES or "s" not in forms)


def _with_json(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as a JSON string."""
    if "function" in call:
        return {**call, "function": _with_json(call["function"])}
    return {**call, "arguments": _json(call["arguments"])} if "arguments" in call else call


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
