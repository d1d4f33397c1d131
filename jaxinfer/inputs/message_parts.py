"""Normalise the content of chat messages: text parts, image parts and results of tools."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from jaxinfer._utils.checks import describe
from jaxinfer.inputs.plain_data import as_json, fields_of, is_list, plain

TOOL_ROLES = ("tool", "function")
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


def content_of(content: Any, role: str, where: str, images: bool) -> Any:
    """Normalise the content of a message to a string, a list of parts, or the object that a tool returned."""
    if isinstance(content, str):
        return plain(content)
    parts = is_list(content)
    if role in TOOL_ROLES and content is not None:
        if parts and all(map(_is_part, content)):
            return _parts(content, where, images)
        return plain(content) if isinstance(content, Mapping) else as_json(plain(content))
    if not parts:
        kinds = "text and image parts" if images else "text parts"
        raise TypeError(f"{where} must be a string or a list of {kinds}, got {describe(content)}.")
    return _parts(content, where, images)


def _is_part(value: Any) -> bool:
    """Return whether an item of a tool result is a message part, rather than the tool's own object with a "type"."""
    if isinstance(value, str):
        return True
    fields = fields_of(value) or {}
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
    fields = fields_of(part)
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


def open_image(image: Any, where: str) -> Any:
    """Open the image of a data URL and apply its EXIF orientation; any other image is returned unchanged.

    Raises:
        ValueError: the data URL is not in base64 or does not contain a readable image.
    """
    if not isinstance(image, str):
        return image
    from PIL import Image, ImageOps

    head, _, data = image.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it is not in base64")
        found = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        ImageOps.exif_transpose(found, in_place=True)
        return found
    except Exception as error:  # Pillow raises errors of many types for broken files
        raise ValueError(f"{where}: the data URL cannot be read as an image: {error}.") from error
