"""Preprocessor configurations of a checkpoint's folder."""

from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.plain_json import read_json

NO_SETTINGS = ("image_processor_type", "processor_class", "auto_map", "feature_extractor_type")
"""Keys of these files that are not settings. Code that they refer to is not executed."""


def described(directory: Path, part: str) -> tuple[str, dict[str, Any]] | None:
    """Return class name and settings of "image_processor" or "feature_extractor"; None if no file names one.

    They are read from processor_config.json, where they are nested, or preprocessor_config.json.
    """
    for file, nested in (("processor_config.json", True), ("preprocessor_config.json", False)):
        path = directory / file
        found = read_json(path) if path.is_file() else {}
        found = found.get(part) if nested else found
        if isinstance(found, dict) and isinstance(found.get(f"{part}_type"), str):
            return found[f"{part}_type"], {k: v for k, v in found.items() if k not in NO_SETTINGS}
    return None
