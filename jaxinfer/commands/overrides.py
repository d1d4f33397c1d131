"""Parse and apply `--hf-overrides`, the config.json overrides accepted by every command that reads a model."""

import argparse
import json
from pathlib import Path
from typing import Any

HELP = (
    "values laid over config.json, as a JSON object or as @FILE with one; null means as if the name were not there: "
    """'{"rope_scaling": {"type": "yarn", "factor": 4.0}, "what": null}'"""
)


def add_hf_overrides(parser: Any) -> None:
    """Add the flag to a parser or an argument group."""
    parser.add_argument("--hf-overrides", type=parse_overrides, default=None, metavar="JSON", help=HELP)


def parse_overrides(text: str) -> dict[str, Any]:
    """Parse the flag's value.

    Raises:
        argparse.ArgumentTypeError: the file cannot be read, or the text is not a JSON object.
    """
    source = "the value"
    if text.startswith("@"):
        source = text[1:]
        try:
            text = Path(source).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise argparse.ArgumentTypeError(
                f"cannot read {source}: {getattr(error, 'strerror', None) or error}"
            ) from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{source} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{source} must be a JSON object of config.json's names, not {type(value).__name__}"
        )
    return value
