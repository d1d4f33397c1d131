"""Read a checkpoint's JSON files as plain data, and format values for error messages."""

import json
from pathlib import Path
from typing import Any

from jaxinfer.errors import CheckpointError

MAX_JSON_BYTES = 64 * 2**20
"""Size limit of a JSON file in bytes. The index of a checkpoint with 100,000 tensors takes about 10 MiB."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Infinity is accepted, because published configurations use it.

    Raises:
        CheckpointError: the file is unreadable or too large, is not a JSON object, or holds NaN or a duplicate name.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; a JSON file may have {MAX_JSON_BYTES}.")
        text = path.read_bytes().decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=refuse_duplicates, parse_constant=_no_nan)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
    except RecursionError:
        raise CheckpointError(f"{path} is not usable JSON: nested too deeply.") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} is not usable JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value


def show(value: Any) -> str:
    """Format a value for an error message, shortened; Python cannot format integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 2**100:
        return f"an integer of {value.bit_length()} bits"
    try:
        return shorten(repr(value))
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} that cannot be written"


def shorten(text: str, limit: int = 200) -> str:
    """Truncate a text to `limit` characters for an error message."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate names in an object (`object_pairs_hook`); json would silently keep the last value."""
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {shorten(twice)!r} is given twice")
    return result


def _no_nan(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is not a number a checkpoint may state")
    return float(text)
