"""Exit statuses of command lines."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from jaxinfer.commands.option_words import logged_option_words, option_words
from jaxinfer.errors import JaxInferError


def status_of(
    work: Callable[[], int], parser: argparse.ArgumentParser | None = None, interrupted: str = "interrupted"
) -> int:
    """Run a command and return its exit status: its own, 2 for bad input and 130 after Ctrl+C, each with a one-line
    message, or 141 after a broken pipe. Messages and log records have the words of the parser's options.
    """
    try:
        with contextlib.nullcontext() if parser is None else logged_option_words(parser):
            return work()
    except (JaxInferError, ValueError, TypeError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # Otherwise the interpreter's final flush of stdout would fail too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        complain(error, parser)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def complain(error: BaseException, parser: argparse.ArgumentParser | None) -> None:
    """Print an error of bad input to stderr."""
    print(f"error: {error if parser is None else option_words(str(error), parser)}", file=sys.stderr)


def end(status: int) -> NoReturn:
    """End the process with an exit status; a program that is still being compiled is given up."""
    programs = sys.modules.get("jaxinfer.engine.runner.programs")
    if programs is not None:
        programs.exit_while_compiling(status)
    sys.exit(status)
