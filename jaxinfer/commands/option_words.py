"""Write messages about arguments of Python in the words of a command line: `max_model_len=8` is `--max-model-len 8`."""

import argparse
import ast
import contextlib
import json
import logging
import re
import shlex
from collections.abc import Iterator

_NOT_BEFORE = r"""(?<![\w.'"\-\[])(?<!\.json: )"""
"""A word after these is part of another name, of a quotation, or an attribute of a file."""
_NOT_AFTER = r"""(?!\w|\.\w|['"(\[])"""
_VALUE = r"""('[^']*'|"[^"]*"|\{[^}]*\}|[\w+./-]*\w)"""


def option_words(message: str, parser: argparse.ArgumentParser) -> str:
    """Return an error message with the names of the parser's options in place of those of arguments.

    A value after `=` is written as a shell takes it. A name of a single word may be a word of the text: it is replaced
    only before `=`, and at the beginning of the message.
    """
    for action in parser._actions:
        name = _name(action)
        if name is None:
            continue
        word = re.escape(action.dest)

        def assign(found: re.Match[str], action: argparse.Action = action) -> str:
            return _assignment(action, found[1])

        message = re.sub(rf"{_NOT_BEFORE}{word}={_VALUE}", assign, message)
        if "_" in action.dest:
            message = re.sub(f"{_NOT_BEFORE}{word}{_NOT_AFTER}=?", name, message)
        else:
            message = re.sub(f"^{word}(?=:| must| is )", name, message)
    return message


@contextlib.contextmanager
def logged_option_words(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Write log records in the words of a command line meanwhile, by the handlers of the root logger."""
    handlers = logging.getLogger().handlers or ([logging.lastResort] if logging.lastResort else [])
    before = [(handler, handler.formatter) for handler in handlers]
    for handler, formatter in before:
        handler.setFormatter(_OptionWords(formatter or logging.Formatter(), parser))
    try:
        yield
    finally:
        for handler, formatter in before:
            handler.setFormatter(formatter)


class _OptionWords(logging.Formatter):
    def __init__(self, inner: logging.Formatter, parser: argparse.ArgumentParser):
        super().__init__()
        self._inner, self._parser = inner, parser

    def format(self, record: logging.LogRecord) -> str:
        return option_words(self._inner.format(record), self._parser)


def _name(action: argparse.Action) -> str | None:
    """Return how an argument is called on the command line; None for those that are no argument of Python."""
    if action.option_strings:
        return max(action.option_strings[:2], key=len) if action.dest != "help" else None
    return None if action.dest == argparse.SUPPRESS else str(action.metavar or action.dest).upper()


def _assignment(action: argparse.Action, value: str) -> str:
    """Return the words that give an option a value: an expression of Python, or a letter that stands for one."""
    name = _name(action)
    if value in ("True", "False") and action.nargs == 0:
        negated = [one for one in action.option_strings if one.startswith("--no-")]
        return str(name) if value == "True" or not negated else negated[0]
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return f"{name} {value}"
    if not isinstance(found, dict):
        return f"{name} {shlex.quote(str(found))}"
    if action.nargs is None:
        return f"{name} {shlex.quote(json.dumps(found))}"
    return f"{name} {' '.join(shlex.quote(f'{key}={one}') for key, one in found.items())}"
