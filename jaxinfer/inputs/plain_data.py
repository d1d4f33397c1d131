"""Convert values of clients to plain data, which chat templates get in place of objects."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np


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
    fields = fields_of(value)
    return f"<{type(value).__name__}>" if fields is None else plain(fields)


def _key(key: Any) -> Any:
    """Convert a dict key to a JSON-compatible key; keys of other types become text."""
    return plain(key) if key is None or isinstance(key, (str, int, float)) else str(key)


def fields_of(value: Any) -> Mapping[Any, Any] | None:
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


def is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
