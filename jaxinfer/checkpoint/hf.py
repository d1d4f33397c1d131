"""Read the JSON files of a Hugging Face folder as plain data. Code that a checkpoint names is never run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.formats import explain_missing
from jaxinfer.checkpoint.packed.declared import declared
from jaxinfer.checkpoint.plain_json import read_json, show
from jaxinfer.checkpoint.size_limits import is_int
from jaxinfer.errors import CheckpointError

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")
_ID_DIGITS = 11
"""Digits from which on a token id cannot be an int32. Python refuses to convert thousands of digits."""


def read_config(directory: Path, hf_overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read config.json and apply `hf_overrides` (see `apply_overrides`, whose errors also apply).

    Raises:
        CheckpointError: the file is missing or unreadable.
        ConfigError: the checkpoint is in an unsupported quantised format.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(explain_missing(directory, "config.json"))
    config = apply_overrides(read_json(path), hf_overrides)
    declared(config, directory)  # raises for formats that are not read
    return config


def apply_overrides(config: Mapping[str, Any], hf_overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the contents of config.json with `hf_overrides` applied by field name.

    An override of None removes the field. A dict for a nested configuration is merged into it: `{"vision_config":
    {"name": None}}` removes one nested field.

    Raises:
        ConfigError: the checkpoint is in an unsupported quantised format.
        TypeError: the overrides are not a dict with string keys.
    """
    overrides = {} if hf_overrides is None else hf_overrides
    if not isinstance(overrides, Mapping) or not all(isinstance(name, str) for name in overrides):
        raise TypeError(f"hf_overrides must be a dict of config.json names, found {show(overrides)}.")
    merged = {**config, **_rope_base(config, overrides), **overrides}
    for name, value in overrides.items():
        part = config.get(name)
        if name.endswith("_config") and isinstance(value, Mapping) and isinstance(part, dict):
            merged[name] = {**part, **_rope_base(part, value), **value}
    config = merged
    if config.get("auto_map"):
        logger.info("config.json names code of its own (auto_map): ignored, never executed.")
    declared(config)  # raises for formats that are not read
    return config


def _rope_base(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base of the rope that a file states inside `rope_parameters`, where overrides replace that object
    without stating one.

    An override of the scaling alone must not change the base that the model was trained with.
    """
    stated, given = config.get("rope_parameters"), overrides.get("rope_scaling") or overrides.get("rope_parameters")
    if not isinstance(stated, Mapping) or not isinstance(given, Mapping):
        return {}
    names = [name for name in ("rope_theta", "partial_rotary_factor") if config.get(name) is None]
    return {name: stated[name] for name in names if stated.get(name) is not None and given.get(name) is None}


def read_generation_config(directory: Path) -> dict[str, Any]:
    """Read generation_config.json; return {} if the file does not exist."""
    path = directory / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def added_token(directory: Path, text: str) -> int | None:
    """Return the id of an added token of the folder's tokenizer, read from its JSON files; None if it is not found."""
    found = {name: read_json(directory / name) for name in _TOKENIZER_FILES if (directory / name).is_file()}
    ids = [found.get("added_tokens.json", {}).get(text)]
    listed = found.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    for name, token in listed.items() if isinstance(listed, dict) else ():
        named = isinstance(token, dict) and token.get("content") == text
        ids += [int(name)] if named and name.isdecimal() and len(name) < _ID_DIGITS else []
    listed = found.get("tokenizer.json", {}).get("added_tokens")
    for token in listed if isinstance(listed, list) else ():
        ids += [token.get("id")] if isinstance(token, dict) and token.get("content") == text else []
    return next((token for token in ids if is_int(token) and 0 <= token < 2**31), None)
