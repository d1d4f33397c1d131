"""Validate a tokenizer's files as plain data; errors name the file and field."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jaxinfer.checkpoint.plain_json import read_json, show
from jaxinfer.checkpoint.tokenizer_errors import REMEDY, cause, is_library_error
from jaxinfer.errors import CheckpointError

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Fields of special tokens with a role."""
_POINTER = b"version https://git-lfs"
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
"""Parts of tokenizer.json other than the model and the added tokens."""
_EMPTY = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}


def _is_token(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))
    )


def _is_tokens(value: Any) -> bool:
    several = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or (
        isinstance(value, (dict, list)) and all(one is not None and _is_token(one) for one in several)
    )


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(
            isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
            for one in value
        )
    return (
        value is None
        or isinstance(value, str)
        or (isinstance(value, dict) and all(isinstance(one, str) for one in value.values()))
    )


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300)


def _is_side(value: Any) -> bool:
    return value in (None, "left", "right")


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(NAMED, (_is_token, "a string, or an object with the string content")),
    **dict.fromkeys(
        ("additional_special_tokens", "extra_special_tokens"),
        (_is_tokens, "a list, or an object by names, of strings and of objects with the string content"),
    ),
    "chat_template": (_is_template, "a string, or a list of objects with name and template"),
    "model_max_length": (_is_number, "a number"),
    "padding_side": (_is_side, '"left" or "right"'),
    "truncation_side": (_is_side, '"left" or "right"'),
    "tokenizer_class": (_is_text, "a string"),
}
"""Fields of tokenizer_config.json and special_tokens_map.json: name -> (check, description of valid values). Any field
may be null."""


def check(directory: Path) -> None:
    """Check the small tokenizer files, which transformers reads without validation.

    Raises:
        CheckpointError: a field is invalid; the error names the file, the field, its value and valid values.
    """
    for path in (directory / TEMPLATE, *sorted((directory / "additional_chat_templates").glob("*.jinja"))):
        if path.is_file():
            read_text(path)
    for name in (CONFIG, "special_tokens_map.json"):
        for field, value in _read(directory / name).items():
            accepts, expected = _FIELDS.get(field, (None, ""))
            if accepts is not None and not accepts(value):
                raise CheckpointError(f"{directory / name}: {field} is {show(value)}; it must be {expected}, or null.")
            if field == "added_tokens_decoder" and value is not None:
                _check_added(value, directory / name)
    for text, token in _read(directory / "added_tokens.json").items():
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise CheckpointError(
                f"{directory / 'added_tokens.json'}: {show(text)} has the id {show(token)}; it must be a whole number "
                "from 0."
            )


def chat_template(directory: Path) -> str | None:
    """Read the chat template from chat_template.jinja, else from chat_template.json, which processors use.

    Raises:
        CheckpointError: the file has no valid template.
    """
    path = directory / TEMPLATE
    if path.is_file():
        return read_text(path)
    path = directory / "chat_template.json"
    template = _read(path).get("chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template is {show(template)}; it must be a string of Jinja source.")
    return template


def explain(directory: Path, error: BaseException) -> CheckpointError:
    """Return an error for a tokenizer that failed to load, naming the broken field of tokenizer.json if found."""
    try:
        if (directory / TOKENIZER).is_file():
            _check_parts(directory / TOKENIZER)
    except CheckpointError as found:
        found.__cause__ = error
        return found
    made = CheckpointError(f"the tokenizer of {directory} cannot be loaded ({cause(error)}): {REMEDY}.")
    made.__cause__ = error
    return made


def describe_content(path: Path) -> str:
    """Describe a broken file by its first bytes, for errors."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(_POINTER):
        return "it is the pointer that git leaves without git-lfs"
    return f"it begins with {head[:24]!r}" if head else "it is empty"


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        CheckpointError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} must be text in UTF-8 ({error}); {describe_content(path)}. Fetch the file again."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file; {} if it does not exist."""
    return read_object(path) if path.is_file() else {}


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object like `read_json`; errors also describe the file's actual content."""
    try:
        return read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).rstrip('.')}; {describe_content(path)}. Fetch the file again.") from error


def _check_added(listed: Any, path: Path) -> None:
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder is {show(listed)}; it must be an object of ids.")
    for name, token in listed.items():
        is_id = name.isascii() and name.isdecimal() and len(name) < 10
        if not is_id or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise CheckpointError(
                f"{path}: added_tokens_decoder has {show(name)}: {show(token)}; it must be an id and an object with "
                "content."
            )


def _check_parts(path: Path) -> None:
    """Find the part of tokenizer.json that the tokenizers library rejects, by loading each part on its own."""
    contents = read_object(path)
    if not isinstance(contents.get("model"), dict):
        raise CheckpointError(
            f"{path}: model is {show(contents.get('model'))}; it must be an object with type and vocab."
        )
    added = contents.get("added_tokens")
    if not isinstance(added, list):
        raise CheckpointError(f"{path}: added_tokens is {show(added)}; it must be a list.")
    parts = {name: {name: contents[name]} for name in (*_PARTS, "model") if contents.get(name) is not None}
    parts |= {f"added_tokens[{at}]": {"added_tokens": [token]} for at, token in enumerate(added)}
    for name, part in parts.items():
        try:
            Tokenizer.from_str(json.dumps({**_EMPTY, **part}))
        except BaseException as error:
            if not is_library_error(error):
                raise
            value = next(iter(part.values()))
            raise CheckpointError(
                f"{path}: {name} is {show(value)}, which the tokenizers library refuses ({cause(error)}). Correct it, "
                f"or {REMEDY}."
            ) from error
