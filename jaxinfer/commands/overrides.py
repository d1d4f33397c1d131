"""Options of several commands: config.json overrides (`--hf-overrides`), speculative decoding and chat templates."""

import argparse
import json
from pathlib import Path
from typing import Any

from jaxinfer.errors import ConfigError
from jaxinfer.speculative_config import SpeculativeConfig

HELP = """values over config.json's, as JSON or @FILE (null removes): '{"rope_theta": 1e6}'"""


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


def parse_speculative(text: str) -> SpeculativeConfig:
    """Parse the value of `--speculative-config`.

    Raises:
        argparse.ArgumentTypeError: the text is not JSON, or a field is wrong.
    """
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not JSON: {error}") from None
    try:
        return SpeculativeConfig.of(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("speculative_config: ")) from None


SPECULATIVE = dict(type=parse_speculative, metavar="JSON", help="""for instance '{"method": "ngram"}'""")
"""Type and help of `--speculative-config`."""


def chat_tokenizer(model: str | Path, template: str | None) -> Any:
    """Load the tokenizer of a model to chat with, and refuse one without a chat template before weights are loaded.

    Args:
        model: argument of `LLM`, which then gets the tokenizer as another one.
        template: Jinja source of `--chat-template`, if any.

    Raises:
        ChatTemplateError, CheckpointError: see `jaxinfer.errors`.
    """
    from jaxinfer.checkpoint.hub import resolve_model
    from jaxinfer.inputs.chat import choose_template
    from jaxinfer.inputs.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(model))
    choose_template(tokenizer, template)
    return tokenizer


def read_template(file: Path | None) -> str | None:
    """Read the Jinja source of `--chat-template`; None if the option is not given.

    Raises:
        ConfigError: the file cannot be read, or is not UTF-8.
    """
    try:
        return None if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {str(file)!r} cannot be read: {error}") from None
